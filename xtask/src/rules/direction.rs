//! The rule of direction: a crate uses only those that the table in ARCHITECTURE.md allows it. The
//! table lies between `<!-- direction:begin -->` and `<!-- direction:end -->`; its first column is
//! the crate, its last the crates that it may use, in backticks, or "anything".

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::steps::{cargo, output};

/// What the table allows a crate.
#[derive(Debug, PartialEq, Eq)]
enum Allowed {
    Anything,
    Only(BTreeSet<String>),
}

/// Tests may use it whatever the table says.
const TESTKIT: &str = "pileus-testkit";

pub fn check() -> Result<Vec<String>> {
    let text = fs::read_to_string("ARCHITECTURE.md").context("ARCHITECTURE.md can't be read")?;
    let table = parse(&text).context("the table of directions in ARCHITECTURE.md")?;
    let metadata = output(cargo().args([
        "metadata",
        "--no-deps",
        "--offline",
        "--format-version",
        "1",
    ]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cargo metadata")?;
    compare(&table, &metadata)
}

fn parse(text: &str) -> Result<BTreeMap<String, Allowed>> {
    let table = text
        .split_once("<!-- direction:begin -->")
        .and_then(|(_, rest)| rest.split_once("<!-- direction:end -->"))
        .context("there is nothing between the direction:begin and direction:end comments")?
        .0;
    let mut rows = BTreeMap::new();
    for line in table.lines().map(str::trim) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').collect();
        let (Some(first), Some(last)) = (cells.first(), cells.last()) else {
            continue;
        };
        // The heading and the line below it have no backticks.
        let Some(name) = words(first).into_iter().next() else {
            continue;
        };
        let allowed = match last.trim() {
            "anything" => Allowed::Anything,
            "nothing" => Allowed::Only(BTreeSet::new()),
            list if !words(list).is_empty() => Allowed::Only(words(list).into_iter().collect()),
            list => bail!(
                "`{name}` may use {list:?}: neither crates in backticks, nothing nor anything"
            ),
        };
        rows.insert(name, allowed);
    }
    Ok(rows)
}

/// The words in backticks.
fn words(cell: &str) -> Vec<String> {
    cell.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_string)
        .collect()
}

fn compare(table: &BTreeMap<String, Allowed>, metadata: &Value) -> Result<Vec<String>> {
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata has no packages")?;
    let name = |value: &Value| value["name"].as_str().unwrap_or_default().to_string();
    let ours: BTreeSet<String> = packages.iter().map(name).collect();
    let mut broken = Vec::new();
    for package in packages {
        let crate_name = name(package);
        let allowed = match table.get(&crate_name) {
            Some(Allowed::Anything) => continue,
            Some(Allowed::Only(allowed)) => allowed,
            None => {
                broken.push(format!(
                    "`{crate_name}` is missing in ARCHITECTURE.md's table of directions"
                ));
                continue;
            }
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let used = name(dependency);
            let for_tests = dependency["kind"] == "dev" && used == TESTKIT;
            if ours.contains(&used) && used != crate_name && !allowed.contains(&used) && !for_tests
            {
                broken.push(format!(
                    "`{crate_name}` depends on `{used}`, which ARCHITECTURE.md's table of directions doesn't allow"
                ));
            }
        }
    }
    for gone in table.keys().filter(|row| !ours.contains(*row)) {
        broken.push(format!(
            "ARCHITECTURE.md's table of directions has `{gone}`, which is no crate here"
        ));
    }
    Ok(broken)
}

#[cfg(test)]
mod unit {
    use super::*;
    use serde_json::json;

    const TABLE: &str = "text\n<!-- direction:begin -->\n\
        | crate | folder | may use |\n|---|---|---|\n\
        | `base` | base/ | nothing |\n\
        | `api` | api/ | `base` |\n\
        | `tests` | tests/ | anything |\n<!-- direction:end -->\n";

    fn metadata(api_uses: &Value) -> Value {
        json!({"packages": [
            {"name": "base", "dependencies": [{"name": "serde", "kind": null}]},
            {"name": "api", "dependencies": api_uses},
            {"name": "tests", "dependencies": [{"name": "api", "kind": null}]},
        ]})
    }

    #[test]
    fn a_dependency_against_the_direction_is_found() {
        let table = parse(TABLE).unwrap();
        let good = metadata(&json!([{"name": "base", "kind": null}]));
        assert_eq!(compare(&table, &good).unwrap(), Vec::<String>::new());
        let bad = metadata(&json!([{"name": "tests", "kind": "build"}]));
        let broken = compare(&table, &bad).unwrap();
        assert_eq!(broken.len(), 1);
        assert!(broken[0].contains("`api` depends on `tests`"), "{broken:?}");
    }

    #[test]
    fn tests_may_use_the_testkit_and_nothing_else_may() {
        let table = parse(TABLE).unwrap();
        for (kind, broken) in [(json!("dev"), 0), (Value::Null, 1)] {
            let mut metadata = metadata(&json!([{"name": TESTKIT, "kind": kind}]));
            let packages = metadata["packages"].as_array_mut().unwrap();
            packages.push(json!({"name": TESTKIT, "dependencies": []}));
            let found = compare(&table, &metadata).unwrap();
            assert_eq!(found.iter().filter(|s| s.contains("`api`")).count(), broken);
        }
    }

    #[test]
    fn crates_and_rows_without_each_other_are_found() {
        let table = parse(&TABLE.replace("`api`", "`gone`")).unwrap();
        let broken = compare(&table, &metadata(&json!([]))).unwrap();
        assert_eq!(broken.len(), 2, "{broken:?}");
    }

    #[test]
    fn a_table_that_says_nothing_is_an_error() {
        assert!(parse("no table").is_err());
        assert!(parse(&TABLE.replace("nothing", "some")).is_err());
    }
}
