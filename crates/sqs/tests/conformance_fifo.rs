//! The suite of polymq-testkit on ministack, with a FIFO queue behind every channel; what kills its server runs on ElasticMQ.

#[path = "harness/mod.rs"]
mod harness;

use std::process::ExitCode;

use polymq_testkit::Suite;

fn main() -> ExitCode {
    Suite::new("sqs_fifo", |purpose| harness::Emulated::start(purpose).fifo()).main()
}
