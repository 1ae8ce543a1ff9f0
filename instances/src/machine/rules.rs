//! What may be asked of an instance in which state: a pure function, and the table that the drawing
//! in `mod.rs` shows.

use pileus_api::InstanceState;
use pileus_base::{Code, Error, InstanceName};

/// What someone asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    Start,
    Stop,
    ForceStop,
    Restart,
    Suspend,
    /// Changing its disk, or taking it, while it runs.
    Freeze,
    /// Commands, files.
    Guest,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    Do,
    /// It is so already.
    Nothing,
    Refuse,
}

/// The rule. The task takes requests one after the other, so the states in between (`starting`,
/// `stopping`, …) are only met when an earlier request failed half-way.
pub fn decide(state: InstanceState, ask: Ask) -> Decision {
    use Ask::{ForceStop, Freeze, Guest, Restart, Start, Stop, Suspend};
    use Decision::{Do, Nothing, Refuse};
    use InstanceState as S;
    match (state, ask) {
        (S::Creating, _) => Refuse,
        (S::Stopped, Start) => Do,
        (S::Stopped, Stop | ForceStop | Suspend) => Nothing,
        (S::Stopped, Restart | Freeze | Guest) => Refuse,
        (S::Suspended, Start | ForceStop) => Do,
        (S::Suspended, Suspend) => Nothing,
        (S::Suspended, Stop | Restart | Freeze | Guest) => Refuse,
        (S::Running, Start) => Nothing,
        (S::Running, Stop | ForceStop | Restart | Suspend | Freeze | Guest) => Do,
        (S::Unknown, Start | Restart | Suspend | Freeze) => Refuse,
        (S::Unknown, Stop | ForceStop | Guest) => Do,
        (S::Suspending, ForceStop) => Do,
        (S::Suspending, _) => Refuse,
        (S::Starting | S::Restarting | S::Stopping, Start | Restart | Suspend | Freeze) => Refuse,
        (S::Starting | S::Restarting | S::Stopping, Stop | ForceStop | Guest) => Do,
    }
}

/// The sentence for a refusal.
pub fn refusal(name: &InstanceName, state: InstanceState, ask: Ask) -> Error {
    let (message, advice) = match (state, ask) {
        (InstanceState::Creating, _) => (
            format!("instance \"{name}\" is being prepared"),
            "Wait until its launch has ended.".to_owned(),
        ),
        (InstanceState::Unknown, Ask::Start) => (
            format!("Instance '{name}' is already running, but in an unknown state."),
            "Try to stop it first.".to_owned(),
        ),
        (InstanceState::Suspended, Ask::Stop) => (
            format!("Cannot shut down suspended instance {name}."),
            format!(
                "Start it first, or give its memory up with `pileus stop --force {name}`; its disk stays."
            ),
        ),
        (InstanceState::Stopped | InstanceState::Suspended, _) => (
            format!("Instance '{name}' is not running"),
            format!("Start it with `pileus start {name}`."),
        ),
        (state, Ask::Start) => (
            format!(
                "Cannot start the instance '{name}' while {}.",
                state.as_str()
            ),
            "Wait, or use `pileus stop --force` first.".to_owned(),
        ),
        (state, _) => (
            format!("Instance '{name}' is {}", state.as_str()),
            "Wait, or use `pileus stop --force` first.".to_owned(),
        ),
    };
    Error::new(Code::WrongState, message).advise(advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table() {
        let mut table = String::new();
        for state in InstanceState::ALL {
            table += &format!("{:<11}", state.as_str());
            for ask in [
                Ask::Start,
                Ask::Stop,
                Ask::ForceStop,
                Ask::Restart,
                Ask::Suspend,
                Ask::Freeze,
                Ask::Guest,
            ] {
                table += match decide(state, ask) {
                    Decision::Do => "do      ",
                    Decision::Nothing => "nothing ",
                    Decision::Refuse => "refuse  ",
                };
            }
            table = table.trim_end().to_owned() + "\n";
        }
        assert_eq!(
            table,
            "\
creating   refuse  refuse  refuse  refuse  refuse  refuse  refuse
stopped    do      nothing nothing refuse  nothing refuse  refuse
starting   refuse  do      do      refuse  refuse  refuse  do
running    nothing do      do      do      do      do      do
restarting refuse  do      do      refuse  refuse  refuse  do
stopping   refuse  do      do      refuse  refuse  refuse  do
suspending refuse  refuse  do      refuse  refuse  refuse  refuse
suspended  do      refuse  do      refuse  nothing refuse  refuse
unknown    refuse  do      do      refuse  refuse  refuse  do
"
        );
    }

    #[test]
    fn every_refusal_says_what_to_do() {
        let name: InstanceName = "foo".parse().unwrap();
        for state in InstanceState::ALL {
            for ask in [
                Ask::Start,
                Ask::Stop,
                Ask::Restart,
                Ask::Suspend,
                Ask::Freeze,
                Ask::Guest,
            ] {
                let error = refusal(&name, state, ask);
                assert!(error.message.contains("foo") && error.advice.is_some());
            }
        }
    }
}
