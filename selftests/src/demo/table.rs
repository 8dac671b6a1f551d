// SPDX-License-Identifier: GPL-2.0
//! The report as a table for people and as CSV.

use std::fmt::Write as _;

use super::{Figure, Report, Row};
use crate::MIB;

/// Bytes as MiB, to a tenth where that says something.
fn mib(bytes: i64) -> String {
    let tenths = (bytes.abs() * 10 + MIB as i64 / 2) / MIB as i64;
    let sign = if bytes < 0 && tenths > 0 { "-" } else { "" };
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{sign}{whole}"),
        (whole, tenth) => format!("{sign}{whole}.{tenth}"),
    }
}

/// The object's own counter, or the machine's where there is none.
fn best(figure: Figure) -> String {
    mib(figure.by_object.map_or(figure.by_machine, |bytes| bytes as i64))
}

fn yes(fact: bool) -> &'static str {
    if fact { "yes" } else { "NO" }
}

/// Column heads, each of three lines.
const HEADS: [[&str; 3]; 10] = [
    ["", "", "guest memory"],
    ["", "", "size"],
    ["", "after", "creation"],
    ["guest", "wrote a", "quarter"],
    ["half of", "that", "punched"],
    ["guest", "touched", "it again"],
    ["", "VM is", "gone"],
    ["zeros", "in the", "hole"],
    ["own data", "else-", "where"],
    ["", "", "read from"],
];

fn cells(row: &Row) -> [String; 10] {
    [
        row.name.into(),
        mib(row.size as i64),
        best(row.after_creation),
        best(row.after_write),
        best(row.after_punch),
        best(row.after_touch_again),
        best(row.after_end),
        yes(row.hole_reads_zeros).into(),
        yes(row.own_data_elsewhere).into(),
        row.source.into(),
    ]
}

/// One aligned table and its notes.
pub fn text(report: &Report) -> String {
    let rows: Vec<_> = report.rows.iter().map(cells).collect();
    let width = |column: usize| {
        let head = HEADS[column].iter().map(|h| h.len());
        head.chain(rows.iter().map(|r| r[column].len())).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..HEADS.len()).map(width).collect();
    let line = |cell: &dyn Fn(usize) -> String| {
        let mut line = String::new();
        for (column, &width) in widths.iter().enumerate() {
            let (cell, gap) = (cell(column), if column == 0 { "" } else { "  " });
            // Names and sources to the left, figures to the right.
            let _ = match column {
                0 | 9 => write!(line, "{gap}{cell:<width$}"),
                _ => write!(line, "{gap}{cell:>width$}"),
            };
        }
        line.trim_end().to_owned() + "\n"
    };
    let mut out = format!(
        "Host memory in MiB; Linux {}, a machine of {} MiB.\n\n",
        report.kernel,
        report.machine / MIB
    );
    for level in [0, 1, 2] {
        out += &line(&|column| HEADS[column][level].into());
    }
    out += &line(&|column| "-".repeat(widths[column]));
    for row in &rows {
        out += &line(&|column| row[column].clone());
    }
    for missing in &report.missing {
        let _ = writeln!(out, "{}: not shown, {}", missing.name, missing.reason);
    }
    let spread = report.rows.iter().find(|row| row.touched != row.size / 4);
    if let Some(row) = spread {
        let _ = writeln!(
            out,
            "\nIn the row of {} MiB the guest writes {} MiB, spread all over, instead of a quarter.",
            row.size / MIB,
            row.touched / MIB
        );
    }
    out += "\"VM is gone\" is measured after everything is closed, from /proc/meminfo.\n";
    out
}

/// A field of a CSV line.
fn field(text: &str) -> String {
    if text.contains([',', '"', '\n']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

/// All figures in bytes, one line per row.
pub fn csv(report: &Report) -> String {
    let steps = ["creation", "write", "punch", "touch_again", "end"];
    let mut head = vec!["memory".to_owned(), "size".into(), "touched".into(), "source".into()];
    for step in steps {
        head.push(format!("after_{step}_by_object"));
        head.push(format!("after_{step}_by_machine"));
    }
    for name in ["hole_reads_zeros", "own_data_elsewhere", "kvm_pages_4k", "kvm_pages_2m"] {
        head.push(name.into());
    }
    let mut out = head.join(",") + "\n";
    for row in &report.rows {
        let mut line = vec![field(row.name), row.size.to_string(), row.touched.to_string()];
        line.push(row.source.into());
        let figures = [row.after_creation, row.after_write, row.after_punch];
        for figure in figures.into_iter().chain([row.after_touch_again, row.after_end]) {
            line.push(figure.by_object.map_or(String::new(), |bytes| bytes.to_string()));
            line.push(figure.by_machine.to_string());
        }
        line.push(row.hole_reads_zeros.to_string());
        line.push(row.own_data_elsewhere.to_string());
        line.push(row.kvm_pages_4k.to_string());
        line.push(row.kvm_pages_2m.to_string());
        out += &(line.join(",") + "\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::Missing;
    use super::*;

    fn report() -> Report {
        let figure = |bytes: u64| Figure { by_object: Some(bytes), by_machine: bytes as i64 + 5 };
        let row = Row {
            name: "a, b",
            size: 256 * MIB,
            touched: 64 * MIB,
            source: "st_blocks",
            after_creation: figure(0),
            after_write: figure(64 * MIB),
            after_punch: figure(32 * MIB),
            after_touch_again: figure(64 * MIB),
            after_end: Figure { by_object: None, by_machine: -100 },
            hole_reads_zeros: true,
            own_data_elsewhere: false,
            kvm_pages_4k: 3,
            kvm_pages_2m: 0,
        };
        let missing = Missing { name: "c", reason: "no c here".into() };
        Report { kernel: "7.3".into(), machine: MIB, rows: vec![row], missing: vec![missing] }
    }

    #[test]
    fn mib_rounds_to_tenths() {
        let m = MIB as i64;
        assert_eq!(
            [0, m, m / 2, -m, -100, 3 * m / 10].map(mib),
            ["0", "1", "0.5", "-1", "0", "0.3"]
        );
    }

    #[test]
    fn csv_has_one_field_per_head() {
        let text = csv(&report());
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[1].starts_with("\"a, b\",268435456,67108864,st_blocks,0,5,"));
        // The quoted name holds one comma more.
        assert_eq!(lines[0].matches(',').count() + 1, lines[1].matches(',').count());
    }

    #[test]
    fn table_is_aligned_and_complete() {
        let text = text(&report());
        assert!(text.contains("a, b"), "{text}");
        assert!(text.contains(" NO  "), "{text}");
        assert!(text.contains("c: not shown, no c here"), "{text}");
        assert!(text.lines().all(|l| l.len() <= 120), "{text}");
    }
}
