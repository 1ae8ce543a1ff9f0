//! What a user writes to name an image. Only the form is decided here; which host knows a name is
//! found out in `hosts/`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use pileus_base::{Code, Error, Result};
use url::Url;

/// The shortest beginning of a digest that is taken as one; below it a name is more likely meant.
const MIN_DIGEST_PREFIX: usize = 12;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ImageRef {
    /// A name or alias that the hosts are asked for in order: `debian`, `trixie`, `default`.
    Name(String),
    /// A name on one host: `build:debian-13`.
    On { remote: String, name: String },
    /// `file:///abs/path`
    File(PathBuf),
    /// `http://…` or `https://…`
    Url(Url),
    /// An image that is in the store: the whole digest or its beginning, in hex digits.
    Digest(String),
}

impl FromStr for ImageRef {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = |why: &str| {
            Error::new(
                Code::InvalidArgument,
                format!("{text:?} does not name an image: {why}"),
            )
            .advise("Give a name (see `find`), file:///PATH, http(s)://URL or a digest.")
        };
        if let Some((scheme, _)) = text.split_once("://") {
            let url = Url::parse(text).map_err(|err| bad(&err.to_string()))?;
            return match url.scheme() {
                "file" => url
                    .to_file_path()
                    .map(Self::File)
                    .map_err(|()| bad("a file needs an absolute path on this host")),
                "http" | "https" if url.has_host() => Ok(Self::Url(url)),
                "http" | "https" => Err(bad("the URL has no host")),
                _ => Err(bad(&format!("{scheme}:// is not supported"))),
            };
        }
        let hex = |s: &str| s.len() <= 64 && s.bytes().all(|b| b.is_ascii_hexdigit());
        if let Some(digits) = text.strip_prefix("sha256:") {
            if digits.is_empty() || !hex(digits) {
                return Err(bad("a digest is sha256: and up to 64 hexadecimal digits"));
            }
            return Ok(Self::Digest(digits.to_ascii_lowercase()));
        }
        if text.len() >= MIN_DIGEST_PREFIX && hex(text) {
            return Ok(Self::Digest(text.to_ascii_lowercase()));
        }
        match text.split_once(':') {
            Some((remote, name)) if is_name(remote) && is_name(name) => Ok(Self::On {
                remote: remote.to_owned(),
                name: name.to_owned(),
            }),
            None if is_name(text) => Ok(Self::Name(text.to_owned())),
            _ => Err(bad("names have letters, digits, and . _ + - / in between")),
        }
    }
}

/// Host and image names: nothing that a shell, a path or a log would stumble over.
pub(crate) fn is_name(text: &str) -> bool {
    text.len() <= 128
        && text
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._+-/".contains(&b))
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::On { remote, name } => write!(f, "{remote}:{name}"),
            Self::File(path) => write!(f, "file://{}", path.display()),
            Self::Url(url) => write!(f, "{url}"),
            Self::Digest(hex) => write!(f, "sha256:{hex}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_form() {
        let name = |s: &str| ImageRef::Name(s.into());
        for (text, want) in [
            ("debian", name("debian")),
            ("24.04", name("24.04")),
            (
                "build:debian-13",
                ImageRef::On {
                    remote: "build".into(),
                    name: "debian-13".into(),
                },
            ),
            ("file:///a/b%20c.img", ImageRef::File("/a/b c.img".into())),
            (
                "http://h:1/x?y",
                ImageRef::Url("http://h:1/x?y".parse().unwrap()),
            ),
            ("sha256:AB", ImageRef::Digest("ab".into())),
            ("abcdefabcdef", ImageRef::Digest("abcdefabcdef".into())),
            ("abcdef", name("abcdef")),
        ] {
            assert_eq!(text.parse::<ImageRef>().unwrap(), want, "{text}");
        }
    }

    #[test]
    fn what_names_no_image() {
        for text in [
            "",
            ":",
            "a:",
            ":b",
            "-x",
            "a b",
            "a\nb",
            "../x",
            "ftp://h/x",
            "file://relative",
            "http://",
            "sha256:",
            "sha256:xyz",
            "a:b:c",
            "é",
        ] {
            let err = text.parse::<ImageRef>().unwrap_err();
            assert_eq!(err.code, Code::InvalidArgument, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn shown_and_read_again_it_is_the_same(text in "[ -~]{0,40}") {
            if let Ok(reference) = text.parse::<ImageRef>() {
                prop_assert_eq!(reference.to_string().parse::<ImageRef>().ok(), Some(reference));
            }
        }
    }
}
