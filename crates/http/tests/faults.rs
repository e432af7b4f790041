//! The faults of polymq-testkit on HTTP itself, without anybody who keeps messages: the sender does, as its contract says.
//! Between sender and consumer are the suite's proxy and a gateway, which takes the part of a broker that is stopped,
//! throttles and knows passwords.

#[path = "faults/gateway.rs"]
mod gateway;
#[allow(missing_docs, unreachable_pub)]
mod peer;

use std::{net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};

use async_trait::async_trait;
use gateway::Gateway;
use polymq_core::Backend;
use polymq_http::HttpBackend;
use polymq_testkit::{BrokerControl, Deletion, Harness, Heartbeat, Passwords, Suite, Switch, Tool, free_port};

#[derive(Debug)]
struct Http {
    gateway: Gateway,
}

impl Http {
    /// A place of its own for a consumer; the gateway knows it by the first part of the path.
    fn place(&self, kind: &str, at: SocketAddr) -> String {
        let port = free_port();
        format!("http://{at}/{kind}/{port}?listen=127.0.0.1:{port}/{kind}/{port}&busy_retry=10ms")
    }
}

impl Harness for Http {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(HttpBackend)
    }

    fn url(&self, at: Option<SocketAddr>) -> String {
        self.place("open", at.unwrap_or(self.gateway.address()))
    }

    fn broker(&self) -> Option<&dyn BrokerControl> {
        Some(&self.gateway)
    }

    fn passwords(&self) -> Tool<'_, dyn Passwords> {
        Ok(self)
    }

    fn alarm(&self) -> Tool<'_, dyn Switch> {
        Err("HTTP has no alarm: a server without room answers 503, as one that throttles")
    }

    fn throttle(&self) -> Tool<'_, dyn Switch> {
        Ok(self)
    }

    fn deletes_in_use(&self) -> Tool<'_, Deletion> {
        Err("nothing is kept between sender and consumer over HTTP, so there is no queue to delete")
    }

    fn members(&self) -> Tool<'_, ()> {
        Err("an address has one listener; who shares it out among several is not the client's affair")
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        // Declared: there is no connection to watch; a request that is not answered in its time, here two seconds, tells.
        Some(Heartbeat { settings: Vec::new(), bound: Duration::from_secs(3) })
    }
}

#[async_trait]
impl Passwords for Http {
    fn address(&self) -> SocketAddr {
        self.gateway.address()
    }

    fn url(&self, password: &str, at: SocketAddr) -> String {
        format!("{}&token={password}", self.place("guarded", at))
    }

    async fn set(&self, password: &str) {
        self.gateway.set_token(password);
    }
}

/// The gateway's 429.
#[async_trait]
impl Switch for Http {
    fn url(&self) -> String {
        Harness::url(self, None)
    }

    async fn turn(&self, on: bool) {
        self.gateway.throttle(on);
    }
}

fn main() -> ExitCode {
    let start = |_| Http { gateway: Gateway::start() };
    Suite::new("http_direct", start).only_faults().and_mutants_of(&["F14_throttled"]).main()
}
