//! What was measured, as it is kept.

use std::{collections::BTreeMap, path::Path, process::Command};

use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
pub struct Results {
    pub processors: usize,
    pub compiler: String,
    pub load_before: f64,
    pub quick: bool,
    pub tables: Vec<Table>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Table {
    pub id: String,
    pub title: String,
    pub note: String,
    /// The number that is compared.
    pub metric: String,
    /// Whether less is better.
    pub less_is_better: bool,
    pub rows: Vec<Row>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    pub key: String,
    pub label: String,
    /// The row that this one is compared with.
    pub baseline: String,
    /// Every sample, in the order of the rounds.
    pub samples: BTreeMap<String, Vec<f64>>,
    /// The median over the rounds of how much better than the baseline of the same round; 1 is alike.
    pub ratio: Option<f64>,
    pub bars: Vec<Bar>,
}

/// What design asks of a row.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Bar {
    pub metric: String,
    /// `>=` or `<=`.
    pub sign: String,
    pub limit: f64,
    pub reached: Option<bool>,
}

impl Row {
    pub fn median(&self, metric: &str) -> Option<f64> {
        median(self.samples.get(metric)?)
    }

    pub fn value(&self, metric: &str) -> Option<f64> {
        if metric == "ratio" { self.ratio } else { self.median(metric) }
    }
}

pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

impl Results {
    pub fn new(quick: bool) -> Self {
        let compiler = Command::new("rustc").arg("--version").output().ok();
        let compiler = compiler.and_then(|output| String::from_utf8(output.stdout).ok()).unwrap_or_default();
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Self {
            processors: std::thread::available_parallelism().map_or(0, usize::from),
            // Name and version, without the commit and date behind them.
            compiler: compiler.split(" (").next().unwrap_or_default().trim().to_owned(),
            load_before: load.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or_default(),
            quick,
            tables: Vec::new(),
        }
    }

    /// Several files as one: the tables of all of them, in this order.
    pub fn read_all(files: &[String]) -> Result<Self, String> {
        let mut all: Option<Self> = None;
        for file in files {
            let next = Self::read(file)?;
            match &mut all {
                Some(all) => {
                    all.load_before = all.load_before.max(next.load_before);
                    all.quick |= next.quick;
                    all.tables.extend(next.tables);
                }
                None => all = Some(next),
            }
        }
        all.ok_or("no results file was named".to_owned())
    }

    pub fn read(file: &str) -> Result<Self, String> {
        let text = std::fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
        serde_json::from_str(&text).map_err(|error| format!("{file}: {error}"))
    }

    pub fn write(&self, file: &Path) -> Result<(), String> {
        let problem = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder).map_err(|error| problem(&error))?;
        }
        let text = serde_json::to_string_pretty(self).map_err(|error| problem(&error))?;
        std::fs::write(file, text + "\n").map_err(|error| problem(&error))
    }
}
