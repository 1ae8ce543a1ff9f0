//! What can be wrong with a recipe without looking at the host, and what is made of it.

use std::path::PathBuf;
use std::time::Duration;

use pileus_api::image_making::{self as api, BuildRequest, Recipe, Seconds, Step, Text};
use pileus_api::{Blob, Digest, InstanceName, LaunchRequest, Warm};
use pileus_base::{Code, Error, Result, Size};
use pileus_images::packed::Machine;
use pileus_images::packed::manifest::Member;
use pileus_instances::guest::cloud_init;
use pileus_instances::machine::BOOT_TIMEOUT;

/// Of a step that says nothing.
const STEP_TIMEOUT: Duration = Duration::from_secs(3600);
/// Of an installation.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(2 * 3600);
const LONGEST: u64 = 24 * 3600;
const DISK: Size = Size::gib(10);
const MEMORY: Size = Size::gib(1);
const MOST_SCRIPT: usize = 256 << 10;
const MOST_TEXT: usize = 200;
const MOST_CMDLINE: usize = 1024;
const SHELL: &str = "sh -eu";

/// A recipe that was checked.
pub(super) struct Order {
    pub from: From,
    pub steps: Vec<Work>,
    pub clean: bool,
    pub keep_on_error: bool,
    pub about: About,
}

/// What the result tells of itself.
#[derive(Debug, Clone, Default)]
pub(super) struct About {
    pub tag: Option<String>,
    pub title: Option<String>,
    pub os: Option<String>,
    pub release: Option<String>,
    pub version: Option<String>,
    pub machine: Option<Machine>,
    pub recipe: Option<Digest>,
}

pub(super) enum From {
    Image(Box<LaunchRequest>),
    Install(Box<Install>),
}

/// An empty disk, and what puts a system on it.
pub(super) struct Install {
    pub medium: Medium,
    pub cpus: u32,
    pub memory: Size,
    pub disk: Size,
    pub user_data: Option<Vec<u8>>,
    pub timeout: Duration,
}

pub(super) enum Medium {
    Iso {
        iso: String,
        checksum: Option<Digest>,
    },
    Kernel {
        kernel: PathBuf,
        initrd: Option<PathBuf>,
        cmdline: String,
    },
}

pub(super) struct Work {
    /// `step 2 (packages)`
    pub name: String,
    pub what: What,
    pub timeout: Duration,
}

pub(super) enum What {
    Run {
        /// Words of the shell, and then variables.
        shell: Vec<String>,
        env: Vec<(String, String)>,
        script: String,
    },
    Copy {
        bytes: u64,
        /// What it is called in a folder.
        name: String,
        to: String,
    },
}

fn bad(what: impl Into<String>) -> Error {
    Error::new(Code::InvalidArgument, what.into())
}

pub(super) fn check(request: BuildRequest, name: InstanceName) -> Result<Order> {
    let recipe = request.recipe;
    if recipe.steps.len() > api::MOST_STEPS {
        return Err(bad(format!(
            "A recipe has {} steps at most",
            api::MOST_STEPS
        )));
    }
    let about = about(&recipe, request.tag)?;
    let timeout = recipe.timeout.map(seconds).transpose()?;
    let installs = !matches!(recipe.from, api::From::Image(_));
    if installs && !recipe.steps.is_empty() {
        return Err(bad(
            "Steps are carried out in an image; an ISO or a kernel installs by itself",
        )
        .advise("Build the image first, and a second recipe from it."));
    }
    let mut copies = request.copies.into_iter();
    let mut steps = Vec::new();
    for (number, step) in (1..).zip(recipe.steps) {
        steps.push(work(number, step, &mut copies, timeout)?);
    }
    if copies.next().is_some() {
        return Err(bad("There are more files than steps that copy"));
    }
    let user_data = match recipe.user_data {
        None => None,
        Some(Text::Inline(text)) => Some(cloud_init::check(text.into_bytes())?.bytes),
        Some(Text::File(_)) => return Err(bad("The file of the user data has to be sent")),
    };
    let from = match recipe.from {
        api::From::Image(image) => From::Image(Box::new(LaunchRequest {
            name: Some(name),
            image: Some(image),
            cpus: recipe.cpus,
            memory: recipe.memory,
            disk: recipe.disk,
            user_data: user_data.map(Blob),
            lease: Some(super::LEASE),
            // Of the boot too, if it is longer than what a boot has anyway.
            timeout: timeout
                .filter(|timeout| *timeout > BOOT_TIMEOUT)
                .map(|timeout| timeout.as_secs()),
            // A template's guest has more behind it than an image's.
            warm: Some(Warm::Never),
            ..LaunchRequest::default()
        })),
        api::From::Iso(from) => From::Install(Box::new(Install {
            medium: Medium::Iso {
                iso: from.iso,
                checksum: from.checksum,
            },
            ..install(recipe.cpus, recipe.memory, recipe.disk, user_data, timeout)?
        })),
        api::From::Kernel(from) => From::Install(Box::new(Install {
            medium: kernel(from)?,
            ..install(recipe.cpus, recipe.memory, recipe.disk, user_data, timeout)?
        })),
    };
    Ok(Order {
        from,
        steps,
        // What was installed is nobody yet, and has no way in.
        clean: recipe.clean && !installs,
        keep_on_error: request.keep_on_error,
        about,
    })
}

fn about(recipe: &Recipe, tag: Option<String>) -> Result<About> {
    let texts = [&recipe.title, &recipe.os, &recipe.release, &recipe.version];
    for text in texts.into_iter().flatten() {
        line(text)?;
    }
    let machine = match recipe.machine.clone() {
        None => None,
        Some(mut machine) => {
            machine.entry("version").or_insert_with(|| 1.into());
            let read = serde_json::from_value(machine.into());
            Some(read.map_err(|err| bad(format!("The recipe's machine is refused: {err}")))?)
        }
    };
    Ok(About {
        tag,
        title: recipe.title.clone(),
        os: recipe.os.clone(),
        release: recipe.release.clone(),
        version: recipe.version.clone(),
        machine,
        recipe: Some(digest_of(recipe)?),
    })
}

/// What a recipe is known by: itself as JSON, wherever on a host the files lie that it names. So the same recipe makes the
/// same image in every folder, and nobody can try out which folder it was.
fn digest_of(recipe: &Recipe) -> Result<Digest> {
    let name = |path: &mut String| {
        if (path.starts_with('/') || path.starts_with("file://"))
            && let Some((_, name)) = path.rsplit_once('/')
        {
            *path = name.to_owned();
        }
    };
    let mut recipe = recipe.clone();
    match &mut recipe.from {
        api::From::Image(image) => name(image),
        api::From::Iso(from) => name(&mut from.iso),
        api::From::Kernel(from) => {
            name(&mut from.kernel);
            from.initrd.iter_mut().for_each(name);
        }
    }
    let text = serde_json::to_vec(&recipe)
        .map_err(|err| Error::internal(format!("Writing a recipe: {err}")))?;
    Ok(Member::of(&text).sha256)
}

/// A text that lists show.
pub(super) fn line(text: &str) -> Result<()> {
    match text.len() <= MOST_TEXT && !text.chars().any(char::is_control) {
        true => Ok(()),
        false => Err(bad(format!(
            "A title, a name or a version is one line of {MOST_TEXT} bytes at most"
        ))),
    }
}

fn seconds(span: Seconds) -> Result<Duration> {
    match span.0 {
        1..=LONGEST => Ok(Duration::from_secs(span.0)),
        other => {
            Err(bad(format!("{other} s is no possible time")).advise("Give 1 second to 24 hours."))
        }
    }
}

fn install(
    cpus: Option<u32>,
    memory: Option<Size>,
    disk: Option<Size>,
    user_data: Option<Vec<u8>>,
    timeout: Option<Duration>,
) -> Result<Install> {
    let cpus = cpus.unwrap_or(1);
    let memory = memory.unwrap_or(MEMORY).round_up(1 << 20);
    let disk = disk.unwrap_or(DISK).round_up(512);
    if cpus == 0 || cpus > crate::service::order::MAX_CPUS {
        return Err(bad(format!("{cpus} is no possible number of CPUs")));
    }
    if memory < Size::mib(64) || disk < Size::mib(1) {
        return Err(Error::new(
            Code::InvalidSize,
            format!("A machine with {memory} of memory and a disk of {disk} installs nothing"),
        )
        .advise("Give 64M of memory and 1M of disk at least."));
    }
    Ok(Install {
        medium: Medium::Iso {
            iso: String::new(),
            checksum: None,
        },
        cpus,
        memory,
        disk,
        user_data,
        timeout: timeout.unwrap_or(INSTALL_TIMEOUT),
    })
}

fn kernel(from: api::Kernel) -> Result<Medium> {
    let absolute = |path: &str| match path.starts_with('/') {
        true => Ok(PathBuf::from(path)),
        false => Err(bad(format!("{path:?} is no absolute path"))),
    };
    let cmdline = from.cmdline.unwrap_or_default();
    if cmdline.len() > MOST_CMDLINE || cmdline.chars().any(char::is_control) {
        return Err(bad("The kernel's command line is too long, or no line"));
    }
    Ok(Medium::Kernel {
        kernel: absolute(&from.kernel)?,
        initrd: from.initrd.as_deref().map(absolute).transpose()?,
        cmdline,
    })
}

fn work(
    number: usize,
    step: Step,
    copies: &mut impl Iterator<Item = u64>,
    timeout: Option<Duration>,
) -> Result<Work> {
    let name = match &step.name {
        None => format!("step {number}"),
        Some(name) => {
            line(name)?;
            format!("step {number} ({name})")
        }
    };
    let own = step.timeout.map(seconds).transpose()?;
    let what = match (step.run, step.copy) {
        (Some(script), None) => run(&name, script, step.shell.as_deref(), step.env)?,
        (None, Some(copy)) => {
            if step.shell.is_some() || !step.env.is_empty() {
                return Err(bad(format!("{name} copies: it has no shell and no env")));
            }
            let plain = |text: &str| !text.chars().any(char::is_control);
            if !copy.to.starts_with('/') || !plain(&copy.to) || copy.to.len() > 4096 {
                return Err(bad(format!(
                    "{name} copies to {:?}, which is no absolute path",
                    copy.to
                )));
            }
            let bytes = copies.next();
            let bytes = bytes.ok_or_else(|| bad(format!("The files of {name} were not sent")))?;
            let from = std::path::Path::new(&copy.from).file_name();
            let from = from
                .and_then(|from| from.to_str())
                .filter(|from| plain(from));
            What::Copy {
                bytes,
                name: from
                    .ok_or_else(|| bad(format!("{name} copies what has no name")))?
                    .to_owned(),
                to: copy.to,
            }
        }
        _ => {
            return Err(bad(format!("{name} has to have either `run` or `copy`")));
        }
    };
    Ok(Work {
        name,
        what,
        timeout: own.or(timeout).unwrap_or(STEP_TIMEOUT),
    })
}

fn run(
    name: &str,
    script: String,
    shell: Option<&str>,
    env: std::collections::BTreeMap<String, String>,
) -> Result<What> {
    if script.len() > MOST_SCRIPT || script.contains('\0') || script.trim().is_empty() {
        return Err(bad(format!(
            "The script of {name} is empty, or has more than {} of text",
            Size(MOST_SCRIPT as u64)
        )));
    }
    let shell = shell.unwrap_or(SHELL);
    let words: Vec<String> = shell.split_whitespace().map(str::to_owned).collect();
    if words.is_empty() || words.len() > 16 || shell.len() > 256 || words[0].contains('=') {
        return Err(bad(format!("{shell:?} of {name} is no shell")));
    }
    for (key, value) in &env {
        let letters = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let good =
            !key.is_empty() && key.bytes().all(letters) && !key.as_bytes()[0].is_ascii_digit();
        if !good || value.contains('\0') || value.len() > 16 << 10 {
            return Err(bad(format!("{key:?} of {name} is no environment variable")));
        }
    }
    Ok(What::Run {
        shell: words,
        env: env.into_iter().collect(),
        script,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn checked(recipe: &Value, copies: &[u64]) -> Result<Order> {
        let request = json!({ "recipe": recipe, "copies": copies });
        let request = serde_json::from_value(request).unwrap();
        check(request, "build-1".parse().unwrap())
    }

    #[test]
    fn a_recipe_that_works() {
        let recipe = json!({
            "from": "debian-13", "timeout": 60, "machine": { "memory": 512 }, "title": "mine",
            "steps": [
                { "run": "true" },
                { "name": "files", "copy": { "from": "x", "to": "/opt/" }, "timeout": 5 },
                { "run": "print(1)", "shell": "python3 -I", "env": { "A": "b" } },
            ],
        });
        let order = checked(&recipe, &[7]).unwrap();
        assert!(order.clean);
        let machine = order.about.machine.unwrap();
        assert_eq!(machine.memory, Some(512));
        let names: Vec<_> = order
            .steps
            .iter()
            .map(|s| (s.name.as_str(), s.timeout.as_secs()))
            .collect();
        assert_eq!(
            names,
            [("step 1", 60), ("step 2 (files)", 5), ("step 3", 60)]
        );
        assert!(matches!(&order.steps[1].what, What::Copy { bytes: 7, .. }));
        assert!(matches!(&order.steps[2].what, What::Run { shell, .. } if shell.len() == 2));
    }

    #[test]
    fn a_recipe_is_known_by_what_it_says() {
        let known = |recipe: Value| checked(&recipe, &[]).unwrap().about.recipe.unwrap();
        let kernel =
            |path: &str, line: &str| json!({ "from": { "kernel": path, "cmdline": line } });
        let one = known(kernel("/home/ann/vmlinuz", "a"));
        assert_eq!(one, known(kernel("/srv/vmlinuz", "a")));
        assert_ne!(one, known(kernel("/srv/vmlinuz", "b")));
        assert_ne!(one, known(kernel("/srv/other", "a")));
        let image = |from: &str| known(json!({ "from": from }));
        assert_eq!(image("file:///home/ann/web.img"), image("file:///web.img"));
        assert_ne!(image("https://a/web.img"), image("https://b/web.img"));
    }

    #[test]
    fn recipes_that_can_not_work_are_refused() {
        let step = |step: Value| json!({ "from": "a", "steps": [step] });
        let long = "x".repeat(MOST_SCRIPT + 1);
        let table = [
            (step(json!({})), "either `run` or `copy`"),
            (
                step(json!({ "run": "a", "copy": { "from": "a", "to": "/b" } })),
                "either `run` or `copy`",
            ),
            (step(json!({ "run": " " })), "is empty"),
            (step(json!({ "run": long })), "is empty, or has more"),
            (step(json!({ "run": "a", "shell": "" })), "no shell"),
            (step(json!({ "run": "a", "shell": "A=b sh" })), "no shell"),
            (
                step(json!({ "run": "a", "env": { "1": "b" } })),
                "no environment variable",
            ),
            (
                step(json!({ "run": "a", "env": { "A B": "b" } })),
                "no environment variable",
            ),
            (
                step(json!({ "run": "a", "timeout": 0 })),
                "no possible time",
            ),
            (
                step(json!({ "run": "a", "timeout": 90_000 })),
                "no possible time",
            ),
            (step(json!({ "run": "a", "name": "b\nc" })), "one line"),
            (
                step(json!({ "copy": { "from": "a", "to": "b" } })),
                "no absolute path",
            ),
            (
                step(json!({ "copy": { "from": "a", "to": "/b" }, "env": { "A": "b" } })),
                "no env",
            ),
            (
                step(json!({ "copy": { "from": "a", "to": "/b" } })),
                "were not sent",
            ),
            (
                step(json!({ "copy": { "from": "..", "to": "/b" } })),
                "were not sent",
            ),
            (json!({ "from": "a", "title": "x".repeat(300) }), "one line"),
            (
                json!({ "from": "a", "machine": { "memory": "much" } }),
                "machine is refused",
            ),
            (
                json!({ "from": "a", "machine": { "version": 7 } }),
                "machine is refused",
            ),
            (
                json!({ "from": "a", "user-data": { "file": "x" } }),
                "has to be sent",
            ),
            (
                json!({ "from": "a", "user-data": "nonsense: [" }),
                "user data",
            ),
            (
                json!({ "from": { "iso": "/a" }, "steps": [{ "run": "a" }] }),
                "installs by itself",
            ),
            (
                json!({ "from": { "iso": "/a" }, "cpus": 0 }),
                "number of CPUs",
            ),
            (
                json!({ "from": { "iso": "/a" }, "disk": 1 }),
                "installs nothing",
            ),
            (json!({ "from": { "kernel": "a" } }), "no absolute path"),
            (
                json!({ "from": { "kernel": "/a", "cmdline": "x\ny" } }),
                "command line",
            ),
        ];
        for (recipe, expected) in table {
            let err = checked(&recipe, &[])
                .err()
                .unwrap_or_else(|| panic!("{recipe}"));
            let said = err.message.to_lowercase();
            assert!(said.contains(&expected.to_lowercase()), "{recipe}: {err}");
            assert_eq!(err.class(), pileus_base::Class::User, "{recipe}");
        }
        assert!(checked(&json!({ "from": "a" }), &[1]).is_err());
        let many: Vec<_> = (0..=api::MOST_STEPS)
            .map(|_| json!({ "run": "a" }))
            .collect();
        assert!(checked(&json!({ "from": "a", "steps": many }), &[]).is_err());
    }
}
