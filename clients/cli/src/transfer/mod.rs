//! Files between host and guests, over the guest's SFTP server.
//!
//! ```text
//! plan.rs     which way, from the words of the line      upload.rs     host → guest
//! report.rs   progress, errors, what to take back        download.rs   guest → host
//! ```
//!
//! Next step: `sftp/`.

mod download;
mod plan;
mod report;
#[cfg(test)]
mod tests;
mod upload;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use pileus_base::{Code, Error};
use pileus_client::Client;
use tokio::io::AsyncWrite;

use self::download::Download;
pub(crate) use self::plan::{Plan, Remote};
use self::report::{Jobs, Report};
use self::upload::Upload;
use crate::error::{CommandError, Kind, Outcome};
use crate::sftp;
use crate::sftp::session::{Failure, Sftp};
use crate::signals::Signals;

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Options {
    pub recursive: bool,
    pub parents: bool,
}

/// Where sources of a guest go.
enum Target {
    /// A folder that is there.
    Into(Arc<OwnedFd>),
    /// A name in a folder.
    As(Arc<OwnedFd>, OsString),
    /// To be opened and written to as it is: a device, a FIFO.
    Open(PathBuf),
}

/// Carries a plan out. Errors of single files are told as they come, and then the exit code is 2.
pub(crate) async fn run(
    client: &Client,
    plan: Plan,
    options: Options,
    visible: bool,
    prefix: &'static str,
) -> Outcome {
    let mut signals = Signals::to_end().map_err(|err| Error::io("Listening to signals", err))?;
    // With standard output as target the bar would only be in the way of what is shown there.
    let report = Report::new(visible, prefix);
    let result = tokio::select! {
        result = carry_out(client, plan, options, &report) => result,
        signal = signals.next() => {
            report.clear().await;
            report.end();
            let text = "Interrupted: the transfer is not complete";
            let error = Error::new(Code::Cancelled, text);
            return Err(CommandError::new(Kind::Signal(signal.number), error));
        }
    };
    report.clear().await;
    report.end();
    result?;
    Ok(if report.failed() { 2 } else { 0 })
}

async fn carry_out(
    client: &Client,
    plan: Plan,
    options: Options,
    report: &Arc<Report>,
) -> Result<(), CommandError> {
    let open = async |name: &str| sftp::open(client, name).await.map(Arc::new);
    let report = report.clone();
    match plan {
        Plan::Put { from, to } => {
            let sftp = open(&to.instance).await?;
            let upload = Upload {
                sftp,
                report,
                options,
            };
            upload.run(&from, &to.path).await.map_err(whole)
        }
        Plan::PutStream { to } => {
            let sftp = open(&to.instance).await?;
            let upload = Upload {
                sftp,
                report: report.clone(),
                options,
            };
            let sent = upload.stream(tokio::io::stdin(), &to.path).await;
            sent.unwrap_or_else(|text| report.fail(&text));
            Ok(())
        }
        Plan::Get { from, to } => {
            let target = download::target(&to, from.len() > 1, options);
            let target = target.map_err(|text| whole(Failure::Other(text)))?;
            let mut guests: BTreeMap<String, Arc<Sftp>> = BTreeMap::new();
            let mut jobs = Jobs::default();
            for source in from {
                let Remote { instance, path } = source;
                let sftp = match guests.get(&instance) {
                    Some(sftp) => sftp.clone(),
                    None => open(&instance).await?,
                };
                guests.insert(instance, sftp.clone());
                let download = Download {
                    sftp,
                    report: report.clone(),
                    options,
                };
                download.run(&path, &target, &mut jobs).await;
            }
            jobs.finish().await;
            Ok(())
        }
        Plan::GetStream { from } => {
            let sftp = open(&from.instance).await?;
            get_stream(sftp, &from.path, options, &report, tokio::io::stdout()).await
        }
    }
}

async fn get_stream(
    sftp: Arc<Sftp>,
    path: &[u8],
    options: Options,
    report: &Arc<Report>,
    to: impl AsyncWrite + Unpin,
) -> Result<(), CommandError> {
    let download = Download {
        sftp,
        report: report.clone(),
        options,
    };
    let sent = download.stream(path, to).await;
    if report.is_closed() {
        return Err(std::io::Error::from(std::io::ErrorKind::BrokenPipe).into());
    }
    sent.unwrap_or_else(|text| report.fail(&text));
    Ok(())
}

/// A failure before anything was copied.
fn whole(failure: Failure) -> CommandError {
    Error::from(failure).into()
}
