//! Running the programs, in turn.

use std::{collections::BTreeMap, path::PathBuf, process::Command};

use crate::{
    plan,
    results::{Bar, Row, Table, median},
};

/// Where the measured programs are: beside this one.
pub struct Programs(PathBuf);

type Numbers = BTreeMap<String, f64>;

impl Programs {
    pub fn beside_this() -> Result<Self, String> {
        let this = std::env::current_exe().map_err(|error| error.to_string())?;
        Ok(Self(this.parent().ok_or("no folder")?.to_owned()))
    }

    fn command(&self, row: &plan::Row, url: Option<&str>, n: u64) -> Command {
        let mut command = Command::new(self.0.join(row.program));
        self.arguments(&mut command, row, url, n);
        command
    }

    fn arguments(&self, command: &mut Command, row: &plan::Row, url: Option<&str>, n: u64) {
        command.arg(row.scenario).arg(format!("n={n}")).args(&row.options);
        if let Some(url) = url {
            command.arg(format!("url={url}"));
        }
    }

    fn run(&self, mut command: Command, row: &plan::Row) -> Result<Numbers, String> {
        let name = || format!("{} {}", row.program, row.scenario);
        let output = command.output().map_err(|error| format!("{}: {error}", name()))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            let last: Vec<_> = text.lines().rev().take(6).collect();
            return Err(format!("{} failed: {}", name(), last.into_iter().rev().collect::<Vec<_>>().join(" / ")));
        }
        serde_json::from_slice(&output.stdout).map_err(|error| format!("{}: {error}", name()))
    }

    /// Instructions a message: two runs of different length, so that what happens once cancels out.
    fn instructions(&self, row: &plan::Row) -> Result<Option<f64>, String> {
        let mut counts = [0.0; 2];
        for (count, n) in counts.iter_mut().zip(INSTRUCTION_RUNS) {
            let mut command = Command::new("valgrind");
            command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(self.0.join(row.program));
            self.arguments(&mut command, row, None, n);
            let Ok(output) = command.output() else { return Ok(None) };
            let text = String::from_utf8_lossy(&output.stderr);
            let collected = text.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok());
            *count = collected.ok_or(format!("callgrind counted nothing for {}", row.scenario))?;
        }
        Ok(Some((counts[1] - counts[0]) / (INSTRUCTION_RUNS[1] - INSTRUCTION_RUNS[0]) as f64))
    }
}

const INSTRUCTION_RUNS: [u64; 2] = [10_000, 30_000];

/// Measures a table: every row once a round, so that what disturbs the machine disturbs all rows alike.
pub fn table(programs: &Programs, table: plan::Table, url: Option<&str>, quick: bool) -> Result<Table, String> {
    let mut samples: Vec<BTreeMap<String, Vec<f64>>> = vec![BTreeMap::new(); table.rows.len()];
    let rounds = if quick { table.quick_rounds } else { table.rounds };
    for round in 0..rounds {
        for (at, row) in table.rows.iter().enumerate() {
            // What is said about how much waits must be so.
            let n = if quick && table.rounds > 1 { row.n / 4 } else { row.n };
            let numbers = programs.run(programs.command(row, url, n), row)?;
            for (name, value) in numbers {
                samples[at].entry(name).or_default().push(value);
            }
            eprint!("\r  round {} of {rounds}, {:<40}", round + 1, row.scenario);
        }
    }
    for (row, samples) in table.rows.iter().zip(&mut samples).filter(|_| table.counts) {
        let mut command = programs.command(row, None, 100_000);
        command.arg("count=1");
        samples.extend(programs.run(command, row)?.into_iter().map(|(name, value)| (name, vec![value])));
        if let Some(count) = programs.instructions(row)? {
            samples.insert("instructions".into(), vec![count]);
        }
        eprint!("\r  counting {:<46}", row.scenario);
    }
    eprint!("\r{:60}\r", "");
    Ok(finish(table, samples))
}

fn finish(table: plan::Table, samples: Vec<BTreeMap<String, Vec<f64>>>) -> Table {
    let of = |key: &str| table.rows.iter().position(|row| row.key == key).and_then(|at| samples[at].get(table.metric));
    let mut rows = Vec::new();
    for (row, own) in table.rows.iter().zip(&samples) {
        let ratios = |base: &Vec<f64>, own: &Vec<f64>| {
            let pairs = base.iter().zip(own);
            let ratios: Vec<f64> =
                pairs.map(|(base, own)| if table.less_is_better { base / own } else { own / base }).collect();
            median(&ratios)
        };
        let ratio = of(row.baseline).zip(own.get(table.metric)).and_then(|(base, own)| ratios(base, own));
        let mut measured = Row {
            key: row.key.into(),
            label: row.label.into(),
            baseline: row.baseline.into(),
            samples: own.clone(),
            ratio,
            bars: Vec::new(),
        };
        measured.bars = row.bars.iter().map(|bar| judge(bar, &measured)).collect();
        rows.push(measured);
    }
    // Bars that compare with another row than the baseline.
    for (at, row) in table.rows.iter().enumerate() {
        for (metric, sign, other, factor) in &row.against {
            let limit =
                rows.iter().find(|row| row.key == *other).and_then(|row| row.value(metric)).map(|value| value * factor);
            let Some(limit) = limit else { continue };
            let bar = judge(&(*metric, *sign, limit), &rows[at]);
            rows[at].bars.push(bar);
        }
    }
    Table {
        id: table.id.into(),
        title: table.title.into(),
        note: table.note.into(),
        metric: table.metric.into(),
        less_is_better: table.less_is_better,
        rows,
    }
}

fn judge((metric, sign, limit): &(&str, &str, f64), row: &Row) -> Bar {
    let reached = row.value(metric).map(|value| if *sign == ">=" { value >= *limit } else { value <= *limit });
    Bar { metric: (*metric).into(), sign: (*sign).into(), limit: *limit, reached }
}
