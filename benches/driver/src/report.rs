//! Tables for people, made of a results file and of nothing else.

use std::fmt::Write;

use crate::results::{Bar, Results, Row, Table};

/// What columns are called, and how many digits their numbers have.
const COLUMNS: &[(&str, &str, usize)] = &[
    ("per_second", "msg/s", 0),
    ("cpu_ns", "CPU ns/msg", 0),
    ("ns", "ns/msg", 0),
    ("p50_us", "p50 us", 2),
    ("p99_us", "p99 us", 2),
    ("p999_us", "p99.9 us", 2),
    ("start_ms", "start ms", 0),
    ("memory_mb", "resident MB", 0),
    ("disk_mb", "disk MB", 0),
    ("allocations", "allocations", 2),
    ("allocated_bytes", "bytes", 0),
    ("instructions", "instructions", 0),
    ("growth_bytes", "growth in bytes", 0),
    ("bound_bytes", "prefetch in bytes", 0),
    ("waiting_bytes", "waiting in bytes", 0),
    ("cpu_percent", "% of a core", 3),
    ("lost", "not accounted for", 0),
];

fn lines(table: &Table) -> Vec<Vec<String>> {
    let columns: Vec<_> =
        COLUMNS.iter().filter(|(key, ..)| table.rows.iter().any(|row| row.samples.contains_key(*key))).collect();
    let has_ratio = table.rows.iter().any(|row| row.ratio.is_some());
    let mut head = vec!["path".to_owned()];
    if has_ratio {
        head.push("ratio".to_owned());
    }
    head.extend(columns.iter().map(|(_, title, _)| (*title).to_owned()));
    head.push("bar".to_owned());
    let mut lines = vec![head];
    for row in &table.rows {
        let mut line = vec![row.label.clone()];
        if has_ratio {
            line.push(row.ratio.map_or("-".into(), |ratio| format!("{ratio:.2}")));
        }
        for (key, _, digits) in &columns {
            line.push(row.median(key).map_or("-".into(), |value| format!("{value:.digits$}")));
        }
        line.push(row.bars.iter().map(bar_text).collect::<Vec<_>>().join(", "));
        lines.push(line);
    }
    lines
}

fn bar_text(bar: &Bar) -> String {
    let digits = if bar.limit >= 100.0 { 0 } else { 2 };
    let verdict = match bar.reached {
        Some(true) => "PASS",
        Some(false) => "below",
        None => "not measured",
    };
    format!("{} {} {:.digits$}: {verdict}", name_of(&bar.metric), bar.sign, bar.limit)
}

fn name_of(metric: &str) -> &str {
    COLUMNS.iter().find(|(key, ..)| *key == metric).map_or(metric, |(_, title, _)| *title)
}

pub fn table_text(table: &Table) -> String {
    let lines = lines(table);
    let widths: Vec<usize> =
        (0..lines[0].len()).map(|at| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0)).collect();
    let mut text = format!("\n{}\n", table.title);
    if !table.note.is_empty() {
        let _ = writeln!(text, "{}", table.note);
    }
    for line in lines {
        let cells: Vec<String> =
            line.iter()
                .zip(&widths)
                .enumerate()
                .map(|(at, (cell, &width))| {
                    if at == 0 || at + 1 == line.len() { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
                })
                .collect();
        let _ = writeln!(text, "  {}", cells.join("  ").trim_end());
    }
    text
}

pub fn text(results: &Results) -> String {
    let tables: String = results.tables.iter().map(table_text).collect();
    format!("{tables}\n{}\n", summary(results))
}

pub fn summary(results: &Results) -> String {
    let bars = results.tables.iter().flat_map(|table| &table.rows).flat_map(|row: &Row| &row.bars);
    let (reached, below): (Vec<_>, Vec<_>) = bars.partition(|bar| bar.reached == Some(true));
    let mut text = format!("{} bars reached, {} not", reached.len(), below.len());
    if results.quick {
        text += "; a quick run, good for nothing but seeing that it works";
    }
    if results.load_before > BUSY {
        let _ = write!(text, "; the machine was busy (load {:.1}) when it began", results.load_before);
    }
    text
}

/// The end of what a program complained about, on one line.
pub fn last_lines(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let lines: Vec<_> = text.trim().lines().collect();
    lines[lines.len().saturating_sub(6)..].join(" / ")
}

const BEGIN: &str = "<!-- results: written by scripts/bench --docs, not by hand -->";
const END: &str = "<!-- end of results -->";
/// From this load on, others disturb what is measured.
const BUSY: f64 = 0.5;

/// Puts tables between the marks of a page: each in the place of the one of its title, the others stay. What they come to is
/// counted over all.
pub fn write_page(files: &[Results], page: &str) -> Result<(), String> {
    let old = std::fs::read_to_string(page).map_err(|error| format!("{page}: {error}"))?;
    let marks = old.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?)));
    let (before, (known, after)) = marks.ok_or(format!("{page} has no marks for the results"))?;
    let mut tables: Vec<(String, String)> = known.split("\n### ").skip(1).map(titled).collect();
    for results in files {
        if results.quick {
            return Err("quick results only show that it works; they are no figures".to_owned());
        }
        for table in &results.tables {
            let new = titled(&page_text(table, results.load_before));
            match tables.iter_mut().find(|(title, _)| *title == new.0) {
                Some(known) => *known = new,
                None => tables.push(new),
            }
        }
    }
    let text: String = tables.iter().map(|(title, text)| format!("\n### {title}\n\n{text}\n")).collect();
    let count = |verdict: &str| text.matches(verdict).count();
    let (reached, below) = (count(": PASS"), count(": below") + count(": not measured"));
    let machine =
        files.first().map_or(String::new(), |file| format!("{} processors, {}. ", file.processors, file.compiler));
    let new = format!("{before}{BEGIN}\n\n{machine}{reached} bars reached, {below} not.\n{text}\n{END}{after}");
    std::fs::write(page, new).map_err(|error| format!("{page}: {error}"))
}

/// The title and what is under it.
fn titled(table: &str) -> (String, String) {
    let (title, text) = table.split_once('\n').unwrap_or((table, ""));
    (title.to_owned(), text.trim().to_owned())
}

fn page_text(table: &Table, load: f64) -> String {
    let mut text = format!("{}\n\n{}", table.title, table.note);
    if load > BUSY {
        let _ = write!(text, " The machine was busy (load {load:.1}) when it began.");
    }
    text += "\n\n";
    for (at, line) in lines(table).iter().enumerate() {
        let _ = writeln!(text, "| {} |", line.join(" | "));
        if at == 0 {
            let _ = writeln!(text, "|---|{}---|", "--:|".repeat(line.len() - 2));
        }
    }
    text
}
