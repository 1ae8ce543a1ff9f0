//! `pileus top`.

use std::time::Duration;

use pileus_api::{InstanceUsage, Size};

use super::node::Node;
use super::{Format, table};

/// What an instance uses at this moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub name: String,
    /// Percent of one processor.
    pub cpu: f64,
    pub cpus: u32,
    /// Bytes.
    pub memory: u64,
    pub memory_total: u64,
    /// Bytes a second.
    pub disk_read: u64,
    pub disk_written: u64,
    pub net_received: u64,
    pub net_sent: u64,
}

/// What was used between two samples, the busiest first. An instance that was not there before, or was
/// started anew meanwhile, has rates from the next sample on.
pub fn rows(before: &[InstanceUsage], now: &[InstanceUsage], between: Duration) -> Vec<Row> {
    let seconds = between.as_secs_f64().max(0.001);
    let rate = |before: u64, now: u64| (now.saturating_sub(before) as f64 / seconds).round();
    let mut rows: Vec<Row> = now
        .iter()
        .map(|now| {
            let known = before.iter().find(|before| before.name == now.name);
            let before = known.unwrap_or(now);
            let cpu = rate(before.cpu_nanoseconds, now.cpu_nanoseconds) / 1e7;
            Row {
                name: now.name.to_string(),
                cpu: (cpu * 10.0).round() / 10.0,
                cpus: now.cpus,
                memory: now.memory,
                memory_total: now.memory_total,
                disk_read: rate(before.disk_read, now.disk_read) as u64,
                disk_written: rate(before.disk_written, now.disk_written) as u64,
                net_received: rate(before.net_received, now.net_received) as u64,
                net_sent: rate(before.net_sent, now.net_sent) as u64,
            }
        })
        .collect();
    rows.sort_by(|a, b| b.cpu.total_cmp(&a.cpu).then_with(|| a.name.cmp(&b.name)));
    rows
}

pub fn render(rows: &[Row], format: Format) -> String {
    match format {
        Format::Table => as_table(rows),
        Format::Json => Node::map([("top", Node::List(rows.iter().map(node).collect()))]).to_json(),
        Format::Csv => as_csv(rows),
        Format::Yaml => Node::map(rows.iter().map(|row| {
            let Node::Map(mut fields) = node(row) else {
                return (row.name.as_str(), Node::Null);
            };
            fields.remove(0);
            (row.name.as_str(), Node::List(vec![Node::Map(fields)]))
        }))
        .to_yaml(),
    }
}

fn as_table(rows: &[Row]) -> String {
    if rows.is_empty() {
        return "No running instances.\n".to_owned();
    }
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let rate = |bytes: u64| Size(bytes).to_string();
            vec![
                row.name.clone(),
                format!("{:.1}%", row.cpu),
                row.cpus.to_string(),
                format!("{}/{}", Size(row.memory), Size(row.memory_total)),
                rate(row.disk_read),
                rate(row.disk_written),
                rate(row.net_received),
                rate(row.net_sent),
            ]
        })
        .collect();
    // All of it fits 80 columns, for names of up to ten letters.
    let columns = [
        ("Name", 10),
        ("CPU", 8),
        ("CPUs", 6),
        ("Memory", 17),
        ("Read/s", 10),
        ("Write/s", 10),
        ("Recv/s", 10),
        ("Sent/s", 0),
    ];
    table::table(&columns, &cells)
}

fn node(row: &Row) -> Node {
    Node::map([
        ("name", Node::text(&row.name)),
        ("cpu_percent", Node::Float(row.cpu)),
        ("cpus", Node::Int(row.cpus.into())),
        ("memory", Node::Int(row.memory)),
        ("memory_total", Node::Int(row.memory_total)),
        ("disk_read_per_second", Node::Int(row.disk_read)),
        ("disk_written_per_second", Node::Int(row.disk_written)),
        ("net_received_per_second", Node::Int(row.net_received)),
        ("net_sent_per_second", Node::Int(row.net_sent)),
    ])
}

fn as_csv(rows: &[Row]) -> String {
    let mut out = "Name,CPU percent,CPU(s),Memory,Memory total,Disk read,Disk written,\
                   Net received,Net sent\n"
        .to_owned();
    for row in rows {
        out.push_str(&format!(
            "{},{:.1},{},{},{},{},{},{},{}\n",
            row.name,
            row.cpu,
            row.cpus,
            row.memory,
            row.memory_total,
            row.disk_read,
            row.disk_written,
            row.net_received,
            row.net_sent
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(name: &str, cpu: u64, bytes: u64) -> InstanceUsage {
        InstanceUsage {
            name: name.parse().unwrap(),
            cpu_nanoseconds: cpu,
            cpus: 2,
            memory: 300 << 20,
            memory_total: 1 << 30,
            disk_read: bytes,
            disk_written: 2 * bytes,
            net_received: 0,
            net_sent: bytes / 2,
        }
    }

    fn sample() -> Vec<Row> {
        let before = [
            usage("idle", 5, 0),
            usage("busy", 0, 0),
            usage("again", 9 << 40, 9 << 40),
        ];
        let now = [
            usage("idle", 5, 0),
            usage("busy", 3_000_000_000, 4 << 20),
            usage("again", 5, 5),
            usage("new", 1 << 40, 1 << 40),
        ];
        rows(&before, &now, Duration::from_secs(2))
    }

    #[test]
    fn rates_come_from_two_samples() {
        let rows = sample();
        assert_eq!((rows[0].name.as_str(), rows[0].cpu), ("busy", 150.0));
        assert_eq!((rows[0].disk_read, rows[0].net_sent), (2 << 20, 1 << 20));
        let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["busy", "again", "idle", "new"]);
        assert!(
            rows[1..]
                .iter()
                .all(|row| row.cpu == 0.0 && row.disk_read == 0)
        );
    }

    #[test]
    fn all_formats() {
        insta::assert_snapshot!("top_table", render(&sample(), Format::Table));
        insta::assert_snapshot!("top_json", render(&sample()[..1], Format::Json));
        insta::assert_snapshot!("top_csv", render(&sample(), Format::Csv));
        insta::assert_snapshot!("top_yaml", render(&sample()[..1], Format::Yaml));
        assert_eq!(render(&[], Format::Table), "No running instances.\n");
    }
}
