//! Mission row I7: the public suite on a backend of a third party, registered from outside of polymq.

mod toy;

use std::{net::SocketAddr, process::ExitCode, sync::Arc};

use polymq_core::Backend;
use polymq_testkit::{Clock, Harness, Suite};

#[derive(Debug)]
struct OfAThirdParty;

impl Harness for OfAThirdParty {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(toy::ToyBackend)
    }

    fn url(&self, _: Option<SocketAddr>) -> String {
        "toy://".into()
    }

    fn clock(&self) -> Clock {
        Clock::Paused
    }

    fn backlog(&self) -> usize {
        10_000
    }
}

fn main() -> ExitCode {
    Suite::new("i7_toy", |_| OfAThirdParty).in_process("there is no broker and no wire").main()
}
