//! What a measured program says about itself: which broker it needs, and its tables. `bench-NAME tables` prints it as
//! JSON, and the driver measures what it reads there; so a program is added without a change to the driver.

mod instance;

pub use instance::Instance;
use serde::{Deserialize, Serialize};

/// All that one program measures.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// What must run meanwhile; empty when the program needs nothing.
    pub brokers: Vec<Broker>,
    /// In the order of the page.
    pub tables: Vec<Table>,
}

/// A broker as `scripts/brokers up` starts one, or polymq's own.
#[derive(Debug, Serialize, Deserialize)]
pub struct Broker {
    /// As `scripts/brokers` calls it.
    pub kind: String,
    /// More of the command line.
    pub options: Vec<String>,
    /// The option `url=` of the measurements on it; `{port}` is replaced.
    pub url: String,
}

impl Broker {
    /// The kind that the measured program serves itself, called as `PROGRAM serve HOST:PORT DIR`.
    pub const POLYMQ: &str = "polymq";

    pub fn new(kind: &str, options: &[&str], url: &str) -> Self {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        Self { kind: kind.to_owned(), options, url: url.to_owned() }
    }
}

/// Rows that are measured in turn and compared with one of them.
#[derive(Debug, Serialize, Deserialize)]
pub struct Table {
    pub id: String,
    pub title: String,
    pub note: String,
    /// The number that is compared.
    pub metric: String,
    /// Whether less of it is better.
    pub less_is_better: bool,
    /// The key of the row that all are compared with; none when it is no row's.
    pub baseline: String,
    /// Whether allocations and instructions are counted too.
    pub counts: bool,
    pub rounds: usize,
    pub quick_rounds: usize,
    pub rows: Vec<Row>,
}

impl Table {
    /// Messages a second, more is better, five rounds.
    pub fn new(id: impl Into<String>, title: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            title: title.into(),
            note: String::new(),
            metric: "per_second".to_owned(),
            less_is_better: false,
            baseline: String::new(),
            counts: false,
            rounds: 5,
            quick_rounds: 1,
            rows: Vec::new(),
        }
    }

    pub fn note(mut self, note: &str) -> Self {
        self.note = note.to_owned();
        self
    }

    pub fn less_of(mut self, metric: &str) -> Self {
        (self.metric, self.less_is_better) = (metric.to_owned(), true);
        self
    }

    pub fn rounds(mut self, rounds: usize, quick: usize) -> Self {
        (self.rounds, self.quick_rounds) = (rounds, quick);
        self
    }

    /// Counts allocations, and instructions under valgrind.
    pub fn counted(mut self) -> Self {
        self.counts = true;
        self
    }

    pub fn compared_with(mut self, baseline: &str) -> Self {
        self.baseline = baseline.to_owned();
        self
    }

    pub fn rows(mut self, rows: impl IntoIterator<Item = Row>) -> Self {
        self.rows.extend(rows);
        self
    }
}

/// One path.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Row {
    /// Of its own in the table; the scenario's name unless it is said otherwise.
    pub key: String,
    pub label: String,
    pub scenario: String,
    /// The kind of the broker that it is about; the first one when empty.
    #[serde(default)]
    pub broker: String,
    /// `key=value`.
    pub options: Vec<String>,
    pub messages: u64,
    pub bars: Vec<Limit>,
}

impl Row {
    pub fn new(scenario: &str, messages: u64, label: &str) -> Self {
        let [key, scenario, label] = [scenario, scenario, label].map(str::to_owned);
        Self { key, label, scenario, messages, ..Self::default() }
    }

    /// For a scenario that has several rows in a table.
    pub fn keyed(mut self, key: &str) -> Self {
        self.key = key.to_owned();
        self
    }

    /// For a program with several brokers.
    pub fn on(mut self, kind: &str) -> Self {
        self.broker = kind.to_owned();
        self
    }

    pub fn with(mut self, option: impl Into<String>) -> Self {
        self.options.push(option.into());
        self
    }

    /// What design asks of a number; `ratio` is the one to the baseline.
    pub fn bar(self, metric: &str, sign: &str, limit: f64) -> Self {
        self.limit(metric, sign, limit, None)
    }

    /// The same, as a multiple of what another row has.
    pub fn against(self, metric: &str, sign: &str, other: &str, factor: f64) -> Self {
        self.limit(metric, sign, factor, Some(other.to_owned()))
    }

    fn limit(mut self, metric: &str, sign: &str, value: f64, of: Option<String>) -> Self {
        self.bars.push(Limit { metric: metric.to_owned(), sign: sign.to_owned(), value, of });
        self
    }
}

/// What design asks of a row.
#[derive(Debug, Serialize, Deserialize)]
pub struct Limit {
    pub metric: String,
    /// `>=` or `<=`.
    pub sign: String,
    pub value: f64,
    /// The key of a row whose number is multiplied by `value`.
    pub of: Option<String>,
}

/// Memory of a slow consumer and the price of an idle one: scenarios `polymq-resident` and `polymq-idle`, which
/// `harness::service` has.
pub fn upkeep(program: &str, broker: &str, quick: bool) -> [Table; 2] {
    let resident = |key, label, messages, size| {
        Row::new("polymq-resident", messages, label).keyed(key).with(format!("size={size}"))
    };
    [
        Table::new(format!("{program}-resident"), format!("{broker}, memory of a slow consumer"))
            .note(
                "Growth of resident memory while many messages wait and a handler takes 10 ms each; it must stay with \
                 the prefetch, not with what waits.",
            )
            .less_of("growth_bytes")
            .rounds(1, 1)
            .rows([
                resident("small", "polymq, 100 000 of 256 bytes wait", 100_000, 256).bar("growth_bytes", "<=", 16e6),
                resident("large", "polymq, 10 000 of 16 KiB wait", 10_000, 16 * 1024).bar("growth_bytes", "<=", 32e6),
            ]),
        Table::new(format!("{program}-idle"), format!("{broker}, idle consumer"))
            .note("Processor time of the whole process while nothing comes.")
            .less_of("cpu_percent")
            .rounds(1, 1)
            .rows([Row::new("polymq-idle", 1, "polymq").with(if quick { "seconds=5" } else { "seconds=20" }).bar(
                "cpu_percent",
                "<=",
                1.0,
            )]),
    ]
}
