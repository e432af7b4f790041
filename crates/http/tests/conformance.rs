//! The suite of polymq-testkit, every delivery over HTTP. Nobody keeps messages between sender and consumer there, so the
//! suite's sender is one that does: see [`kept`].

#[path = "conformance/kept.rs"]
mod kept;

use std::{net::SocketAddr, process::ExitCode, sync::Arc};

use polymq_core::Backend;
use polymq_testkit::{Harness, Suite};

#[derive(Debug)]
struct Http;

impl Harness for Http {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(kept::KeptBackend)
    }

    fn url(&self, _: Option<SocketAddr>) -> String {
        "kept://".into()
    }
}

fn main() -> ExitCode {
    Suite::new("http", |_| Http)
        .in_process("the sender that keeps messages is this process: http_direct has the faults, on a wire")
        .main()
}
