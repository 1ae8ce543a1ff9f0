//! Columns of text: each as wide as its header's place or its longest entry asks, two spaces apart,
//! nothing after the last entry of a line.

use crate::terminal::harmless;

/// A column's header and its least width, spaces between columns included.
pub type Column = (&'static str, usize);

/// Lays out a header line and rows, a newline after each.
pub fn table(columns: &[Column], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = columns
        .iter()
        .enumerate()
        .map(|(i, (_, least))| {
            let longest = rows.iter().filter_map(|row| row.get(i));
            let longest = longest.map(|cell| cell.chars().count() + 2).max();
            longest.unwrap_or(0).max(*least)
        })
        .collect();
    let mut out = String::new();
    let header: Vec<String> = columns.iter().map(|(name, _)| (*name).to_owned()).collect();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}"));
        }
        out.push_str(harmless(line.trim_end()).as_ref());
        out.push('\n');
    }
    out
}
