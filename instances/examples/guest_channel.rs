//! Drives the guest channel by hand, without a daemon:
//!
//! ```text
//! guest_channel seed DIR [USER_DATA]     makes DIR/seed.iso and keys (MAC 52:54:00:12:34:56)
//! guest_channel wait DIR                 waits for hello and for cloud-init, with times
//! guest_channel report DIR
//! guest_channel follow DIR SECONDS       every change that the link tells, with times
//! guest_channel exec DIR COMMAND…        one command; its exit code is ours
//! guest_channel shell DIR                the login shell with a terminal of 80×24 (lines in, lines out)
//! guest_channel tcp DIR ADDRESS COMMAND… over the network instead of the port
//! guest_channel measure DIR              connection, second command, 100 MiB each way
//! guest_channel stall DIR                a sleeping reader must not hold up other commands
//! ```
//!
//! DIR is where QEMU has `agent.sock` and `ssh0.sock` (and `ssh1.sock` for a second port).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pileus_base::{Error, Result};
use pileus_instances::guest::agent::AgentLink;
use pileus_instances::guest::cloud_init;
use pileus_instances::guest::exec::{Control, ExecSpec, Output, Tty};
use pileus_instances::guest::keys::InstanceKeys;
use pileus_instances::guest::seed::{self, SeedNic, SeedSpec};
use pileus_instances::guest::ssh::{Access, SshPool};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["seed", dir, rest @ ..] => make_seed(Path::new(dir), rest.first().copied()),
        ["wait", dir] => wait(Path::new(dir)).await,
        ["follow", dir, seconds] => follow(Path::new(dir), seconds).await,
        ["report", dir] => report(Path::new(dir)).await,
        ["exec", dir, command @ ..] => {
            let command = command.iter().map(|c| (*c).to_owned()).collect();
            run(pool(Path::new(dir)), command, None).await
        }
        ["tcp", dir, address, command @ ..] => {
            let command = command.iter().map(|c| (*c).to_owned()).collect();
            run(tcp_pool(Path::new(dir), address), command, None).await
        }
        ["shell", dir] => {
            let tty = Tty {
                term: "xterm".into(),
                cols: 80,
                rows: 24,
                modes: vec![],
            };
            run(pool(Path::new(dir)), vec![], Some(tty)).await
        }
        ["measure", dir] => measure(Path::new(dir)).await,
        ["stall", dir] => stall(Path::new(dir)).await,
        _ => {
            eprintln!("see the head of guest_channel.rs");
            std::process::exit(2);
        }
    };
    match done {
        Ok(code) => std::process::exit(code),
        Err(err) => {
            eprintln!("{} ({})", err, err.code);
            std::process::exit(255);
        }
    }
}

fn make_seed(dir: &Path, user_data: Option<&str>) -> Result<i32> {
    let keys = InstanceKeys::load(dir).or_else(|_| InstanceKeys::generate())?;
    keys.store(dir)?;
    let user_data = match user_data {
        Some(path) => {
            let bytes = pileus_base::files::read_bounded(Path::new(path), 16 << 20)?;
            Some(cloud_init::check(bytes)?.bytes)
        }
        None => None,
    };
    let id = format!("i-{}", uuid::Uuid::new_v4().simple());
    let iso = seed::build(&SeedSpec {
        instance_id: &id,
        hostname: "by-hand",
        user_data: user_data.as_deref(),
        network_config: None,
        nics: &[SeedNic {
            mac: "52:54:00:12:34:56".into(),
            optional: false,
        }],
        keys: &keys,
        timezone: Some("Europe/Berlin"),
    })?;
    pileus_base::files::write_atomic(&dir.join("seed.iso"), &iso, 0o600)?;
    Ok(0)
}

fn link(dir: &Path) -> AgentLink {
    AgentLink::connect(dir.join("agent.sock"))
}

fn pool(dir: &Path) -> Result<SshPool> {
    let mut ports: Vec<(String, PathBuf)> = vec![("pileus.ssh.0".into(), dir.join("ssh0.sock"))];
    if dir.join("ssh1.sock").exists() {
        ports.push(("pileus.ssh.1".into(), dir.join("ssh1.sock")));
    }
    let access = Access::Agent {
        link: link(dir),
        ports,
    };
    Ok(SshPool::new(access, "ubuntu", InstanceKeys::load(dir)?))
}

fn tcp_pool(dir: &Path, address: &str) -> Result<SshPool> {
    let access = Access::Tcp {
        address: address
            .parse()
            .map_err(|err| Error::internal(format!("{address}: {err}")))?,
        pin_file: dir.join("pinned_host_key"),
    };
    Ok(SshPool::new(access, "ubuntu", InstanceKeys::load(dir)?))
}

async fn wait(dir: &Path) -> Result<i32> {
    let start = Instant::now();
    let link = link(dir);
    let hello = link.wait_hello().await?;
    println!("{:6.2} s  {hello:?}", start.elapsed().as_secs_f32());
    let end = link.wait_cloud_init().await?;
    println!("{:6.2} s  {end:?}", start.elapsed().as_secs_f32());
    Ok(0)
}

async fn follow(dir: &Path, seconds: &str) -> Result<i32> {
    let start = Instant::now();
    let end = Duration::from_secs(seconds.parse().unwrap_or(60));
    let link = link(dir);
    let (mut hello, mut state, mut report) = (link.hello(), link.cloud_init(), link.report());
    let rest = tokio::time::sleep(end);
    tokio::pin!(rest);
    loop {
        let what = tokio::select! {
            () = &mut rest => return Ok(0),
            _ = hello.changed() => match hello.borrow_and_update().as_ref() {
                Some(hello) => format!("hello, boot {}", hello.boot_id),
                None => "agent gone".into(),
            },
            _ = state.changed() => {
                let state = state.borrow_and_update();
                format!("cloud-init {:?} {:?} {:?}", state.state, state.stage, state.errors)
            }
            _ = report.changed() => {
                let report = report.borrow_and_update();
                let ips: Vec<_> = report.iter().flat_map(|r| r.ipv4()).collect();
                format!("report, addresses {ips:?}")
            }
        };
        println!("{:6.2} s  {what}", start.elapsed().as_secs_f32());
    }
}

async fn report(dir: &Path) -> Result<i32> {
    let report = link(dir).fresh_report(Duration::from_secs(10)).await?;
    println!("{report:#?}");
    Ok(0)
}

async fn run(pool: Result<SshPool>, command: Vec<String>, tty: Option<Tty>) -> Result<i32> {
    let pool = pool?;
    let spec = ExecSpec {
        command,
        tty,
        ..ExecSpec::default()
    };
    let mut session = pool.exec(&spec).await?;
    let stdin = session.stdin.clone();
    drop(std::mem::replace(
        &mut session.stdin,
        tokio::sync::mpsc::channel(1).0,
    ));
    tokio::spawn(async move {
        let mut input = tokio::io::stdin();
        let mut buffer = vec![0; 32 * 1024];
        while let Ok(count @ 1..) = input.read(&mut buffer).await {
            if stdin
                .send(Bytes::copy_from_slice(&buffer[..count]))
                .await
                .is_err()
            {
                return;
            }
        }
    });
    let (mut out, mut err) = (tokio::io::stdout(), tokio::io::stderr());
    while let Some(piece) = session.output.recv().await {
        match piece {
            Output::Stdout(bytes) => {
                let _ = out.write_all(&bytes).await;
                let _ = out.flush().await;
            }
            Output::Stderr(bytes) => {
                let _ = err.write_all(&bytes).await;
            }
            Output::Exit(code) => return Ok(code.cast_signed()),
            Output::Signal(name) => {
                eprintln!("ended by SIG{name}");
                return Ok(128);
            }
            Output::Failed(err) => return Err(err),
        }
    }
    Ok(255)
}

/// Runs a command to its end; its output and exit code.
async fn collect(
    pool: &SshPool,
    command: &[&str],
    input: Option<Vec<Bytes>>,
) -> Result<(Vec<u8>, u32)> {
    let spec = ExecSpec {
        command: command.iter().map(|c| (*c).to_owned()).collect(),
        ..ExecSpec::default()
    };
    let mut session = pool.exec(&spec).await?;
    let control = session.control.clone();
    let stdin = session.stdin.clone();
    tokio::spawn(async move {
        for piece in input.unwrap_or_default() {
            if stdin.send(piece).await.is_err() {
                return;
            }
        }
        let _ = control.send(Control::Eof).await;
    });
    let mut out = Vec::new();
    while let Some(piece) = session.output.recv().await {
        match piece {
            Output::Stdout(bytes) => out.extend_from_slice(&bytes),
            Output::Stderr(bytes) => eprint!("{}", String::from_utf8_lossy(&bytes)),
            Output::Exit(code) => return Ok((out, code)),
            other => return Err(Error::internal(format!("{other:?}"))),
        }
    }
    Err(Error::internal("no end"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

async fn measure(dir: &Path) -> Result<i32> {
    let pool = pool(dir)?;
    let start = Instant::now();
    pool.warm_up().await?;
    println!("connection: {:?}", start.elapsed());
    for _ in 0..8 {
        let start = Instant::now();
        let (out, code) = collect(&pool, &["echo", "hi there"], None).await?;
        assert_eq!((out.as_slice(), code), (b"hi there\n".as_slice(), 0));
        println!("exec: {:?}", start.elapsed());
    }
    let mib = 100;
    let piece: Vec<u8> = (0..1 << 20_u32)
        .map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let pieces: Vec<Bytes> = (0..mib)
        .flat_map(|n| {
            let mut own = piece.clone();
            own[0] = n as u8;
            let own = Bytes::from(own);
            (0..32)
                .map(move |k| own.slice(k * 32768..(k + 1) * 32768))
                .collect::<Vec<_>>()
        })
        .collect();
    let mut hash = Sha256::new();
    for piece in &pieces {
        hash.update(piece);
    }
    let wanted = hex(&hash.finalize());
    let start = Instant::now();
    let (out, _) = collect(&pool, &["sh", "-c", "cat > /tmp/measure"], Some(pieces)).await?;
    assert!(out.is_empty());
    let seconds = start.elapsed().as_secs_f32();
    println!(
        "{mib} MiB in: {seconds:.2} s, {:.1} MiB/s",
        mib as f32 / seconds
    );
    let (out, _) = collect(&pool, &["sha256sum", "/tmp/measure"], None).await?;
    assert!(
        String::from_utf8_lossy(&out).starts_with(&wanted),
        "what arrived is not what was sent"
    );
    let start = Instant::now();
    let (out, _) = collect(&pool, &["cat", "/tmp/measure"], None).await?;
    let seconds = start.elapsed().as_secs_f32();
    println!(
        "{mib} MiB out: {seconds:.2} s, {:.1} MiB/s",
        mib as f32 / seconds
    );
    assert_eq!(
        hex(&Sha256::digest(&out)),
        wanted,
        "what came back is not what was sent"
    );
    println!("both exact: {wanted}");
    Ok(0)
}

async fn stall(dir: &Path) -> Result<i32> {
    let pool = pool(dir)?;
    pool.warm_up().await?;
    let mut sleeper = pool
        .exec(&ExecSpec {
            command: vec!["yes".into()],
            ..ExecSpec::default()
        })
        .await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    for _ in 0..3 {
        let start = Instant::now();
        let (out, _) = collect(&pool, &["echo", "hi"], None).await?;
        assert_eq!(out, b"hi\n");
        println!("beside a sleeping reader: {:?}", start.elapsed());
    }
    let mut bytes = 0;
    while bytes < 16 << 20 {
        match sleeper.output.recv().await {
            Some(Output::Stdout(piece)) => bytes += piece.len(),
            other => return Err(Error::internal(format!("{other:?}"))),
        }
    }
    drop(sleeper);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (out, code) = collect(&pool, &["pgrep", "-x", "yes"], None).await?;
    println!(
        "after the drop: pgrep yes gives {code} {:?}",
        String::from_utf8_lossy(&out)
    );
    Ok(0)
}
