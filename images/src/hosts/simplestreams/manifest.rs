//! What an image host's catalogue says, read strictly: two JSON documents in the simplestreams form.
//!
//! ```text
//! streams/v1/index.json   index → the first entry with datatype image-downloads → path
//! PATH                    products → versions → items { ftype, path, sha256 }
//! ```
//!
//! The documents come from outside. A product or a version that breaks a rule is left out, and the
//! others stay; only what is no such document at all is an error. Nothing here does I/O.
//!
//! Next step: `mod.rs` (which entry a name means).

use std::collections::BTreeMap;

use pileus_base::{Code, Digest, Error, Result};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

/// Which of an image's forms is taken, the best one first. `uefi1.img` is only there for releases that
/// are not supported any more.
const FORMS: [&str; 3] = ["uefi1.img", "img.xz", "disk1.img"];
/// The longest text for people that is believed.
const MAX_TEXT: usize = 200;

/// One version of an image, and where its disk is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Names that mean this version; none if there is a newer one.
    pub aliases: Vec<String>,
    /// `Ubuntu`
    pub os: String,
    /// `noble`
    pub codename: String,
    /// `24.04 LTS`
    pub title: String,
    /// `20260101`
    pub version: String,
    pub supported: bool,
    /// Of the disk as it is downloaded.
    pub digest: Digest,
    /// Below the catalogue's address.
    pub path: String,
}

#[derive(Deserialize)]
struct Index {
    index: BTreeMap<String, Lenient<Stream>>,
}

#[derive(Deserialize)]
struct Stream {
    datatype: String,
    path: String,
}

#[derive(Deserialize)]
struct Products {
    products: BTreeMap<String, Lenient<Product>>,
}

#[derive(Deserialize)]
struct Product {
    #[serde(default)]
    aliases: String,
    arch: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    release: String,
    #[serde(default)]
    release_title: String,
    #[serde(default)]
    supported: bool,
    versions: BTreeMap<String, Lenient<Version>>,
}

#[derive(Deserialize)]
struct Version {
    items: BTreeMap<String, Lenient<Form>>,
}

#[derive(Deserialize)]
struct Form {
    /// The item's name, if it is missing.
    ftype: Option<String>,
    path: String,
    sha256: String,
}

/// A part that may be unreadable without harm to the others.
#[derive(Deserialize)]
#[serde(untagged)]
enum Lenient<T> {
    Good(T),
    Bad(IgnoredAny),
}

impl<T> Lenient<T> {
    fn good(self) -> Option<T> {
        match self {
            Lenient::Good(part) => Some(part),
            Lenient::Bad(_) => None,
        }
    }
}

/// Reads the index: the path of the products, below the catalogue's address.
pub fn index(bytes: &[u8]) -> Result<String> {
    let index: Index = serde_json::from_slice(bytes).map_err(|err| nonsense(&err.to_string()))?;
    index
        .index
        .into_values()
        .filter_map(Lenient::good)
        .find(|stream| stream.datatype == "image-downloads")
        .map(|stream| stream.path)
        .filter(|path| is_below(path))
        .ok_or_else(|| nonsense("it names no images to download"))
}

/// Reads the products for one processor (`amd64`), the oldest release first, each one's versions the
/// newest first.
pub fn products(bytes: &[u8], arch: &str) -> Result<Vec<Entry>> {
    let all: Products = serde_json::from_slice(bytes).map_err(|err| nonsense(&err.to_string()))?;
    let mut entries = Vec::new();
    let mut products: Vec<_> = all
        .products
        .into_values()
        .filter_map(Lenient::good)
        .filter(|product| product.arch == arch)
        .collect();
    products.sort_by(|a, b| order(&a.release_title).cmp(&order(&b.release_title)));
    for product in products {
        add(product, &mut entries);
    }
    Ok(entries)
}

fn add(product: Product, entries: &mut Vec<Entry>) {
    let mut aliases: Vec<String> = product
        .aliases
        .split(',')
        .map(str::trim)
        .filter(|alias| crate::reference::is_name(alias))
        .map(str::to_owned)
        .collect();
    let supported = product.supported || aliases.iter().any(|alias| alias.contains("devel"));
    let mut versions: Vec<_> = product.versions.into_iter().collect();
    versions.sort_by(|(a, _), (b, _)| order(b).cmp(&order(a)));
    for (version, parts) in versions {
        let Some((digest, path)) = parts.good().and_then(best) else {
            continue;
        };
        if !crate::reference::is_name(&version) {
            continue;
        }
        entries.push(Entry {
            // Only the newest version that can be had has names.
            aliases: std::mem::take(&mut aliases),
            os: text(&capital(&product.os)),
            codename: text(&product.release),
            title: text(&product.release_title),
            version,
            supported,
            digest,
            path,
        });
    }
}

/// The form of the disk that is taken.
fn best(version: Version) -> Option<(Digest, String)> {
    let items = version.items.into_iter();
    let forms: Vec<(String, Form)> = items
        .filter_map(|(name, form)| {
            let form = form.good()?;
            Some((form.ftype.clone().unwrap_or(name), form))
        })
        .collect();
    FORMS.iter().find_map(|wanted| {
        let (_, form) = forms.iter().find(|(kind, _)| kind == wanted)?;
        let digest = form.sha256.parse().ok()?;
        is_below(&form.path).then(|| (digest, form.path.clone()))
    })
}

/// Whether a path stays below the address that it is joined to, and is nothing but a path.
fn is_below(path: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._+-~:/".contains(&b);
    // A colon in the first part would make the rest an address of its own.
    let first = path.split('/').next().unwrap_or_default();
    !first.contains(':')
        && path.len() <= 1024
        && path.bytes().all(plain)
        && path
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != "..")
}

/// A text for people: one line, no control characters, not endless.
fn text(raw: &str) -> String {
    raw.chars()
        .filter(|c| !c.is_control())
        .take(MAX_TEXT)
        .collect()
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars
        .next()
        .map(|first| first.to_uppercase().chain(chars).collect())
        .unwrap_or_default()
}

/// Sorts `4.10` before `24.04 LTS`.
fn order(title: &str) -> (Vec<u32>, &str) {
    let numbers = title.split(|c: char| !c.is_ascii_digit());
    let numbers = numbers.filter_map(|number| number.parse().ok());
    (numbers.collect(), title)
}

fn nonsense(why: &str) -> Error {
    Error::new(
        Code::FetchFailed,
        format!("The image host's list can't be understood: {why}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hash(digit: char) -> String {
        digit.to_string().repeat(64)
    }

    fn document(products: &serde_json::Value) -> Vec<u8> {
        serde_json::to_vec(&serde_json::json!({ "format": "products:1.0", "products": products }))
            .unwrap()
    }

    fn product(items: &serde_json::Value) -> serde_json::Value {
        serde_json::json!({
            "aliases": "24.04,default,lts,n,noble", "arch": "amd64", "os": "ubuntu",
            "release": "noble", "release_codename": "Noble Numbat", "release_title": "24.04 LTS",
            "supported": true, "version": "24.04",
            "versions": {
                "20260101": { "items": items },
                "20250101": { "items": { "disk1.img":
                    { "ftype": "disk1.img", "path": "noble/old.img", "sha256": hash('b'), "size": 1 } } },
            },
        })
    }

    fn form(ftype: &str, digit: char) -> serde_json::Value {
        serde_json::json!({ "ftype": ftype, "path": format!("noble/{ftype}"), "sha256": hash(digit) })
    }

    #[test]
    fn the_index_leads_to_the_first_list_of_images() {
        let path = index(
            br#"{"index": {"a": {"datatype": "image-ids", "path": "x"}, "b": 7,
                "c": {"datatype": "image-downloads", "path": "streams/v1/com.x:y:z.json", "format": "?"}}}"#,
        );
        assert_eq!(path.unwrap(), "streams/v1/com.x:y:z.json");
        for bad in [
            "",
            "[]",
            "{}",
            r#"{"index": {}}"#,
            r#"{"index": {"a": {"datatype": "image-downloads", "path": "../../x"}}}"#,
            r#"{"index": {"a": {"datatype": "image-downloads", "path": "http://else.invalid/x"}}}"#,
            r#"{"index": {"a": {"datatype": "image-downloads", "path": "http:x/y"}}}"#,
            r#"{"index": {"a": {"datatype": "image-downloads", "path": "/x"}}}"#,
            r#"{"index": {"a": {"datatype": "image-downloads", "path": ""}}}"#,
        ] {
            let err = index(bad.as_bytes()).unwrap_err();
            assert_eq!(err.code, Code::FetchFailed, "{bad}");
        }
    }

    #[test]
    fn only_the_newest_version_has_names() {
        let entries = products(
            &document(&serde_json::json!({
                "p": product(&serde_json::json!({ "disk1.img": form("disk1.img", 'a') })) })),
            "amd64",
        )
        .unwrap();
        let seen: Vec<_> = entries
            .iter()
            .map(|e| (e.version.as_str(), e.aliases.len(), &e.digest.hex()[..1]))
            .collect();
        assert_eq!(seen, [("20260101", 5, "a"), ("20250101", 0, "b")]);
        let newest = &entries[0];
        assert_eq!(
            (
                newest.os.as_str(),
                newest.title.as_str(),
                newest.codename.as_str()
            ),
            ("Ubuntu", "24.04 LTS", "noble")
        );
        assert!(newest.supported);
    }

    #[test]
    fn the_best_form_is_taken_and_a_broken_version_is_passed_over() {
        let digit = |items: &serde_json::Value| {
            let entries = products(
                &document(&serde_json::json!({ "p": product(items) })),
                "amd64",
            )
            .unwrap();
            entries[0].digest.hex().chars().next().unwrap()
        };
        let all = serde_json::json!({ "1": form("disk1.img", '1'), "2": form("uefi1.img", '2'),
            "3": form("img.xz", '3'), "4": form("manifest", '4') });
        assert_eq!(digit(&all), '2');
        let some = serde_json::json!({ "1": form("disk1.img", '1'), "3": form("img.xz", '3') });
        assert_eq!(digit(&some), '3');
        for bad in [
            serde_json::json!({ "4": form("manifest", '4') }),
            serde_json::json!({ "1": { "path": "x", "sha256": hash('1') } }),
            serde_json::json!({ "1": { "ftype": "disk1.img", "path": "x" } }),
            serde_json::json!({ "1": { "ftype": "disk1.img", "path": "x", "sha256": "abc" } }),
            serde_json::json!({ "1": { "ftype": "disk1.img", "path": "/etc/x", "sha256": hash('1') } }),
            serde_json::json!({ "1": { "ftype": "disk1.img", "path": "a/../b", "sha256": hash('1') } }),
            serde_json::json!({ "1": { "ftype": "disk1.img", "path": "x?y", "sha256": hash('1') } }),
            serde_json::json!({ "1": 1 }),
            serde_json::json!([]),
        ] {
            // The older version gets the names then.
            assert_eq!(digit(&bad), 'b', "{bad}");
        }
    }

    #[test]
    fn versions_are_compared_by_number_and_items_known_by_name() {
        let item = |digit: char| serde_json::json!({ "items": { "disk1.img": { "path": "x", "sha256": hash(digit) } } });
        let mut noble = product(&serde_json::json!({}));
        noble["versions"] = serde_json::json!({
            "20260101": item('1'), "20260101.9": item('2'), "20260101.10": item('3') });
        let entries = products(&document(&serde_json::json!({ "p": noble })), "amd64").unwrap();
        let digits: String = entries.iter().map(|e| &e.digest.hex()[..1]).collect();
        assert_eq!(digits, "321");
        assert_eq!(entries[0].version, "20260101.10");
    }

    #[test]
    fn other_processors_and_broken_products_are_left_out() {
        let good = product(&serde_json::json!({ "1": form("disk1.img", '1') }));
        let mut arm = good.clone();
        arm["arch"] = "arm64".into();
        let mut dev = good.clone();
        dev["supported"] = false.into();
        dev["aliases"] = "26.10, devel".into();
        dev["release_title"] = "26.10".into();
        let mut old = good.clone();
        old["supported"] = false.into();
        old["aliases"] = "9.10,../x,".into();
        old["release_title"] = "9.10".into();
        let list = document(&serde_json::json!({
            "a": good, "b": arm, "c": dev, "d": old, "e": null, "f": { "arch": "amd64", "versions": 3 } }));
        let entries = products(&list, "amd64").unwrap();
        let named: Vec<_> = entries.iter().filter(|e| !e.aliases.is_empty()).collect();
        let seen: Vec<_> = named
            .iter()
            .map(|e| (e.aliases[0].as_str(), e.supported))
            .collect();
        assert_eq!(seen, [("9.10", false), ("24.04", true), ("26.10", true)]);
        assert_eq!(named[0].aliases, ["9.10"]);
    }

    #[test]
    fn what_is_no_list() {
        for bad in [
            "",
            "null",
            "{}",
            "<html>",
            r#"{"products": []}"#,
            "{\"products\": {",
        ] {
            let err = products(bad.as_bytes(), "amd64").unwrap_err();
            assert_eq!(err.code, Code::FetchFailed, "{bad}");
        }
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            prop_oneof![
                "[ -~]{0,12}",
                Just("amd64".to_owned()),
                Just("disk1.img".to_owned()),
                Just("a".repeat(64))
            ]
            .prop_map(Into::into),
        ];
        let keys = prop_oneof![
            Just("products".to_owned()),
            Just("versions".to_owned()),
            Just("items".to_owned()),
            Just("arch".to_owned()),
            Just("ftype".to_owned()),
            Just("path".to_owned()),
            Just("sha256".to_owned()),
            "[a-z0-9.]{1,6}",
        ];
        leaf.prop_recursive(7, 64, 6, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(serde_json::Value::from),
                proptest::collection::btree_map(keys.clone(), inner, 0..6)
                    .prop_map(serde_json::Value::from_iter),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_list_breaks_a_promise(products in json(), cut in 0_usize..400) {
            let mut bytes = document(&products);
            bytes.truncate(bytes.len().min(cut.max(1) * 8));
            for entry in super::products(&bytes, "amd64").unwrap_or_default() {
                prop_assert!(is_below(&entry.path));
                prop_assert!(entry.aliases.iter().all(|a| crate::reference::is_name(a)));
            }
            let _ = index(&bytes);
        }
    }
}
