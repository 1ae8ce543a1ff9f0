//! The table that everything ends in: one row a figure, with its alternative and its bound.

use std::fmt;

/// One figure.
#[derive(Debug, Default)]
pub struct Row {
    pub what: String,
    pub ours: String,
    pub alternative: String,
    pub ratio: String,
    pub bound: String,
    /// None where nothing is promised.
    pub met: Option<bool>,
}

#[derive(Debug, Default)]
pub struct Table(Vec<Row>);

impl Table {
    pub fn add(&mut self, row: Row) {
        eprintln!("{}", line(&row));
        self.0.push(row);
    }

    /// A figure that nothing is promised about.
    pub fn note(&mut self, what: impl Into<String>, ours: String, alternative: String) {
        self.add(Row {
            what: what.into(),
            ours,
            alternative,
            ..Row::default()
        });
    }

    pub fn failed(&mut self, what: &str, why: &str) {
        eprintln!("{what} failed: {why}");
        let why: String = why.chars().take(200).collect();
        self.add(Row {
            what: what.into(),
            ours: format!("FAILED: {}", why.replace(['\n', '|'], " ")),
            met: Some(false),
            ..Row::default()
        });
    }

    pub fn all_met(&self) -> bool {
        self.0.iter().all(|row| row.met != Some(false))
    }
}

fn line(row: &Row) -> String {
    let met = match row.met {
        Some(true) => "yes",
        Some(false) => "**no**",
        None => "",
    };
    format!(
        "| {} | {} | {} | {} | {} | {met} |",
        row.what, row.ours, row.alternative, row.ratio, row.bound
    )
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| what | ours | alternative | ratio | bound | met? |")?;
        writeln!(f, "|---|---|---|---|---|---|")?;
        for row in &self.0 {
            writeln!(f, "{}", line(row))?;
        }
        Ok(())
    }
}
