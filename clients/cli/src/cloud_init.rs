//! Reads what is for cloud-init (user data, a network configuration) from where the user says: a file,
//! a FIFO, standard input or a web address. The bytes are passed on as they are; the daemon looks at
//! them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::time::Duration;

use futures_util::StreamExt;

use crate::error::CommandError;

/// cloud-init itself takes far less from most clouds.
const LIMIT: usize = 16 << 20;

pub(crate) async fn read(source: &str) -> Result<Vec<u8>, CommandError> {
    let read = match source.starts_with("http://") || source.starts_with("https://") {
        true => fetch(source).await,
        false => read_here(source).await,
    };
    read.map_err(|why| {
        CommandError::usage(format!(
            "Could not load cloud-init configuration: {why}\nPlease ensure that pileus can read it."
        ))
    })
}

/// Reads a network configuration: a file, a FIFO or `-`.
pub(crate) async fn read_network(source: &str) -> Result<Vec<u8>, CommandError> {
    let read = read_here(source).await;
    read.map_err(|why| {
        CommandError::usage(format!("Could not load the network configuration: {why}"))
    })
}

async fn read_here(source: &str) -> Result<Vec<u8>, String> {
    let source = source.to_owned();
    // A FIFO or a terminal may keep the reader waiting.
    tokio::task::spawn_blocking(move || read_local(&source))
        .await
        .unwrap_or_else(|err| Err(err.to_string()))
}

fn read_local(source: &str) -> Result<Vec<u8>, String> {
    if source == "-" {
        return bounded(io::stdin().lock(), "standard input");
    }
    let failed = |err: io::Error| format!("{source}: {err}");
    let kind = fs::metadata(source).map_err(failed)?.file_type();
    // A device is what /dev/stdin may lead to.
    if !(kind.is_file() || kind.is_fifo() || kind.is_char_device()) {
        return Err(format!("{source} is not a file"));
    }
    bounded(File::open(source).map_err(failed)?, source)
}

fn bounded(from: impl Read, name: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    from.take(LIMIT as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|err| format!("{name}: {err}"))?;
    if bytes.len() > LIMIT {
        return Err(too_large(name));
    }
    Ok(bytes)
}

async fn fetch(url: &str) -> Result<Vec<u8>, String> {
    let failed = |err: reqwest::Error| {
        let mut text = format!("{url}: {err}");
        let mut cause = std::error::Error::source(&err);
        while let Some(inner) = cause {
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        text
    };
    let client = reqwest::Client::builder()
        .connect_timeout(Duration::from_secs(15))
        .read_timeout(Duration::from_secs(30))
        .build()
        .map_err(failed)?;
    let response = client.get(url).send().await.map_err(failed)?;
    let mut body = response.error_for_status().map_err(failed)?.bytes_stream();
    let mut bytes = Vec::new();
    while let Some(part) = body.next().await {
        bytes.extend_from_slice(&part.map_err(failed)?);
        if bytes.len() > LIMIT {
            return Err(too_large(url));
        }
    }
    Ok(bytes)
}

fn too_large(name: &str) -> String {
    format!("{name} is larger than {} MiB", LIMIT >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_fifos_are_read_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::write(path("a"), "#cloud-config\n\0").unwrap();
        assert_eq!(read_local(&path("a")).unwrap(), b"#cloud-config\n\0");
        fs::write(path("big"), vec![b'x'; LIMIT + 1]).unwrap();
        assert!(read_local(&path("big")).unwrap_err().contains("16 MiB"));
        assert!(read_local(&path("none")).is_err());
        assert!(read_local(&path("")).unwrap_err().contains("not a file"));

        let fifo = path("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status();
        assert!(made.unwrap().success());
        let writer = {
            let fifo = fifo.clone();
            std::thread::spawn(move || fs::write(fifo, "from a fifo"))
        };
        assert_eq!(read_local(&fifo).unwrap(), b"from a fifo");
        writer.join().unwrap().unwrap();
    }
}
