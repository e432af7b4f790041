//! The suite of polymq-testkit on a polymq broker in a process of its own.

mod harness;

use std::process::ExitCode;

use polymq_testkit::Suite;

fn main() -> ExitCode {
    harness::serve_if_asked();
    Suite::new("kubemq", harness::Served::start).main()
}
