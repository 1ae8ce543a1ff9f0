//! Running programs, with one line a step and the time that each took.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// On CI nothing is skipped because the machine lacks it.
pub fn on_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| value == "true")
}

/// The cargo that runs this program, so that a chosen toolchain stays chosen.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// A command as a person would type it.
fn shown(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program())
        .file_name()
        .unwrap_or_else(|| command.get_program());
    std::iter::once(program)
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs it with this terminal; an exit code other than 0 is an error.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("`{}` can't be started", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", shown(command));
    }
    Ok(())
}

/// Runs it and returns what it printed; its errors go to this terminal.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("`{}` can't be started", shown(command)))?;
    if !output.status.success() {
        bail!("`{}` failed ({})", shown(command), output.status);
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("`{}` printed no text", shown(command)))
}

/// Steps one after the other, each with its time; the first one that fails ends the run.
#[derive(Default)]
pub struct Steps {
    times: Vec<(&'static str, Duration)>,
}

impl Steps {
    pub fn step(&mut self, name: &'static str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        eprintln!("==> {name}");
        let start = Instant::now();
        let result = work();
        self.times.push((name, start.elapsed()));
        result.with_context(|| format!("step \"{name}\""))
    }

    pub fn print_times(&self) {
        let total: Duration = self.times.iter().map(|(_, time)| *time).sum();
        eprintln!("==> times");
        for (name, time) in &self.times {
            eprintln!("{:>8.1} s  {name}", time.as_secs_f64());
        }
        eprintln!("{:>8.1} s  all of these", total.as_secs_f64());
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_failing_program_is_named_with_its_arguments() {
        let error = run(Command::new("false").arg("now")).unwrap_err();
        assert!(format!("{error:#}").contains("`false now` failed"));
        let error = run(&mut Command::new("/nowhere/program")).unwrap_err();
        assert!(format!("{error:#}").contains("`program` can't be started"));
    }

    #[test]
    fn the_first_failing_step_is_named_and_timed() {
        let mut steps = Steps::default();
        steps.step("good", || Ok(())).unwrap();
        let error = steps.step("bad", || bail!("no")).unwrap_err();
        assert_eq!(format!("{error:#}"), "step \"bad\": no");
        assert_eq!(steps.times.len(), 2);
    }
}
