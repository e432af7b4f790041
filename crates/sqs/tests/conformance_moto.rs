//! The suite of polymq-testkit on moto, a second opinion; what kills its server runs on ElasticMQ, which keeps what it has taken.

#[path = "harness/mod.rs"]
mod harness;

use std::process::ExitCode;

use polymq_testkit::Suite;

fn main() -> ExitCode {
    Suite::new("sqs_moto", |purpose| harness::Emulated::start("moto", purpose)).main()
}
