//! Running the programs, in turn.

use std::{collections::BTreeMap, path::PathBuf, process::Command};

use plan::{Instance, Limit, Plan};

use crate::{
    report::last_lines,
    results::{Bar, Row, Table, median},
};

/// A program, and what it says that it measures.
pub struct Program {
    path: PathBuf,
    pub plan: Plan,
}

type Numbers = BTreeMap<String, f64>;

/// What runs meanwhile, by its kind.
pub type Brokers = Vec<(String, Instance)>;

fn url<'a>(brokers: &'a Brokers, row: &plan::Row) -> Option<&'a str> {
    let found = brokers.iter().find(|(kind, _)| row.broker.is_empty() || *kind == row.broker);
    found.map(|(_, instance)| instance.url.as_str())
}

const INSTRUCTION_RUNS: [u64; 2] = [10_000, 30_000];

impl Program {
    /// The program `bench-NAME` beside this one.
    pub fn open(name: &str, quick: bool) -> Result<Self, String> {
        let this = std::env::current_exe().map_err(|error| error.to_string())?;
        let path = this.with_file_name(format!("bench-{name}"));
        let mut command = Command::new(&path);
        command.arg("tables").args(quick.then_some("quick"));
        let plan = output(command).and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string()));
        let plan = plan.map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self { path, plan })
    }

    pub fn start_brokers(&self) -> Result<Brokers, String> {
        let start = |broker: &plan::Broker| Ok((broker.kind.clone(), Instance::start(&self.path, broker)?));
        self.plan.brokers.iter().map(start).collect()
    }

    fn options(&self, command: &mut Command, row: &plan::Row, url: Option<&str>, n: u64) {
        command.arg(&row.scenario).arg(format!("n={n}")).args(&row.options);
        command.args(url.map(|url| format!("url={url}")));
    }

    fn run(&self, row: &plan::Row, url: Option<&str>, n: u64, more: &[&str]) -> Result<Numbers, String> {
        let mut command = Command::new(&self.path);
        self.options(&mut command, row, url, n);
        command.args(more);
        let numbers = output(command).and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string()));
        numbers.map_err(|error| format!("{}: {error}", row.scenario))
    }

    /// Instructions a message: two runs of different length, so that what happens once cancels out.
    fn instructions(&self, row: &plan::Row) -> Result<Option<f64>, String> {
        let mut counts = [0.0; 2];
        for (count, n) in counts.iter_mut().zip(INSTRUCTION_RUNS) {
            let mut command = Command::new("valgrind");
            command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(&self.path);
            self.options(&mut command, row, None, n);
            let Ok(output) = command.output() else { return Ok(None) };
            if !output.status.success() {
                return Err(format!("{} under callgrind: {}", row.scenario, last_lines(&output.stderr)));
            }
            let text = String::from_utf8_lossy(&output.stderr);
            let collected = text.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok());
            *count = collected.ok_or(format!("callgrind counted nothing for {}", row.scenario))?;
        }
        Ok(Some((counts[1] - counts[0]) / (INSTRUCTION_RUNS[1] - INSTRUCTION_RUNS[0]) as f64))
    }
}

/// What a command prints.
fn output(mut command: Command) -> Result<Vec<u8>, String> {
    let output = command.output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(output.stdout) } else { Err(last_lines(&output.stderr)) }
}

/// Measures a table: every row once a round, so that what disturbs the machine disturbs all rows alike.
pub fn table(program: &Program, table: &plan::Table, brokers: &Brokers, quick: bool) -> Result<Table, String> {
    let mut samples: Vec<BTreeMap<String, Vec<f64>>> = vec![BTreeMap::new(); table.rows.len()];
    let rounds = if quick { table.quick_rounds } else { table.rounds };
    for round in 0..rounds {
        for (row, samples) in table.rows.iter().zip(&mut samples) {
            // What is said about how much waits must be so.
            let n = if quick && table.rounds > 1 { row.messages / 4 } else { row.messages };
            for (name, value) in program.run(row, url(brokers, row), n, &[])? {
                samples.entry(name).or_default().push(value);
            }
            eprint!("\r  round {} of {rounds}, {:<40}", round + 1, row.scenario);
        }
    }
    for (row, samples) in table.rows.iter().zip(&mut samples).filter(|_| table.counts) {
        let counted = program.run(row, url(brokers, row), 100_000, &["count=1"])?;
        samples.extend(counted.into_iter().map(|(name, value)| (name, vec![value])));
        if let Some(count) = program.instructions(row)? {
            samples.insert("instructions".into(), vec![count]);
        }
        eprint!("\r  counting {:<46}", row.scenario);
    }
    eprint!("\r{:60}\r", "");
    Ok(finish(table, samples))
}

fn finish(table: &plan::Table, samples: Vec<BTreeMap<String, Vec<f64>>>) -> Table {
    let baseline = table.rows.iter().position(|row| row.key == table.baseline);
    let baseline = baseline.and_then(|at| samples[at].get(&table.metric).cloned());
    let ratio = |own: &BTreeMap<String, Vec<f64>>| {
        let pairs = baseline.as_ref()?.iter().zip(own.get(&table.metric)?);
        let better = |(base, own): (&f64, &f64)| if table.less_is_better { base / own } else { own / base };
        median(&pairs.map(better).collect::<Vec<f64>>())
    };
    let mut rows: Vec<Row> = Vec::new();
    for (row, samples) in table.rows.iter().zip(samples) {
        rows.push(Row {
            key: row.key.clone(),
            label: row.label.clone(),
            baseline: table.baseline.clone(),
            ratio: ratio(&samples),
            samples,
            bars: Vec::new(),
        });
    }
    // When all are there, since a bar may compare with any of them.
    for (at, row) in table.rows.iter().enumerate() {
        rows[at].bars = row.bars.iter().filter_map(|limit| judge(limit, &rows[at], &rows)).collect();
    }
    Table {
        id: table.id.clone(),
        title: table.title.clone(),
        note: table.note.clone(),
        metric: table.metric.clone(),
        less_is_better: table.less_is_better,
        rows,
    }
}

fn judge(bar: &Limit, row: &Row, rows: &[Row]) -> Option<Bar> {
    let limit = match &bar.of {
        Some(key) => rows.iter().find(|row| row.key == *key)?.value(&bar.metric)? * bar.value,
        None => bar.value,
    };
    let reached = row.value(&bar.metric).map(|value| if bar.sign == ">=" { value >= limit } else { value <= limit });
    Some(Bar { metric: bar.metric.clone(), sign: bar.sign.clone(), limit, reached })
}
