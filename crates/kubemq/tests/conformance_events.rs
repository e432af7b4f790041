//! The suite of polymq-testkit with `topics=events`: topics are at most once, with wildcards. Faults are of queues, which are the
//! same as in `conformance.rs`.

#[path = "harness/mod.rs"]
mod harness;

use std::process::ExitCode;

use polymq_testkit::Suite;

fn main() -> ExitCode {
    harness::serve_if_asked();
    Suite::new("kubemq_events", |purpose| harness::Served::start(purpose).with_events()).without_faults().main()
}
