//! What a fault did, in numbers.

use std::{fmt, fs::OpenOptions, io::Write, time::Duration};

/// Names the file that the suite appends its figures to, a line for each case with tabs between the columns: suite, case,
/// what became of it, accepted, handled, lost, duplicated, milliseconds to recover, states of the connection.
pub const FIGURES_VARIABLE: &str = "POLYMQ_TEST_FIGURES";

/// The figures of one case, from the ledger that decides about it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Figures {
    /// Sends that were confirmed.
    pub accepted: usize,
    /// Calls of handlers that ended, and dead letters.
    pub handled: usize,
    /// Messages that were accepted and never handled.
    pub lost: usize,
    /// Calls of handlers beyond the first of each message.
    pub duplicated: usize,
    /// From the end of the fault until a message that was sent after it was handled; the longest.
    pub recovery: Option<Duration>,
    /// What health told, in order.
    pub health: String,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { accepted, handled, lost, duplicated, recovery, health } = self;
        write!(f, "{accepted} accepted, {handled} handled, {lost} lost, {duplicated} duplicated")?;
        if let Some(recovery) = recovery {
            write!(f, ", works again after {recovery:?}")?;
        }
        write!(f, "; health: {health}")
    }
}

/// Appends a line, if somebody wants it.
pub(crate) fn write(suite: &str, case: &str, outcome: &str, figures: Option<&Figures>) {
    let Some(file) = std::env::var_os(FIGURES_VARIABLE) else { return };
    let columns = figures.map_or_else(
        || "\t\t\t\t\t".to_owned(),
        |f| {
            let recovery = f.recovery.map(|took| took.as_millis().to_string()).unwrap_or_default();
            format!("{}\t{}\t{}\t{}\t{recovery}\t{}", f.accepted, f.handled, f.lost, f.duplicated, f.health)
        },
    );
    let file_of_lines = OpenOptions::new().create(true).append(true).open(&file);
    // One write, because several suites may append at a time.
    let written = file_of_lines
        .and_then(|mut lines| lines.write_all(format!("{suite}\t{case}\t{outcome}\t{columns}\n").as_bytes()));
    written.unwrap_or_else(|error| panic!("{FIGURES_VARIABLE}={}: {error}", file.display()));
}
