//! The suite of polymq-testkit on ministack; what kills its server runs on ElasticMQ, which keeps what it has taken.

#[path = "harness/mod.rs"]
mod harness;

use std::process::ExitCode;

use polymq_testkit::Suite;

fn main() -> ExitCode {
    Suite::new("sqs", harness::Emulated::start).main()
}
