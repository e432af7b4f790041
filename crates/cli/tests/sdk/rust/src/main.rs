//! The Rust SDK (kubemq 1.0.0), each case in a process of its own: `PROGRAM --list`, or `PROGRAM ADDRESS CASE`.

mod events;
mod queues;
mod requests;

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use kubemq::KubemqClient;
use tokio::time::{Instant, sleep};

type Case = (&'static str, fn() -> Pin<Box<dyn Future<Output = ()>>>);

/// The cases of these names, as functions that can be looked up.
#[macro_export]
macro_rules! cases {
    ($($name:ident)*) => {
        pub(crate) const CASES: &[$crate::Case] = &[$((stringify!($name), || Box::pin($name()))),*];
    };
}

#[tokio::main]
async fn main() {
    let cases = [queues::CASES, events::CASES, requests::CASES].concat();
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [list] if list == "--list" => cases.iter().for_each(|(name, _)| println!("{name}")),
        [_, wanted] => {
            let case = cases.iter().find(|(name, _)| name == wanted).expect("a case of this name");
            (case.1)().await;
        }
        _ => panic!("usage: PROGRAM --list, or PROGRAM ADDRESS CASE"),
    }
}

async fn client(id: &str) -> KubemqClient {
    let address = std::env::args().nth(1).expect("an address");
    let (host, port) = address.rsplit_once(':').expect("HOST:PORT");
    let builder = KubemqClient::builder().host(host).port(port.parse().expect("a port")).client_id(id);
    // A busy machine's broker may stand still for longer than the SDK waits for its signs of life.
    let builder = builder.keepalive_timeout(Duration::from_secs(60));
    builder.check_connection(true).build().await.expect("a connection")
}

/// Waits until something is so; what the SDK tells only to callbacks has to be asked for.
async fn until(about: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(40);
    while !is_so().await {
        assert!(Instant::now() < deadline, "{about}: not within 40 s");
        sleep(Duration::from_millis(20)).await;
    }
}

/// What callbacks were told.
#[derive(Clone, Debug, Default)]
struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    fn add(&self, body: &[u8]) {
        self.0.lock().expect("no panic").push(String::from_utf8_lossy(body).into_owned());
    }

    /// Without the probes by which a subscription is found to listen: it is not confirmed.
    fn bodies(&self) -> Vec<String> {
        let seen = self.0.lock().expect("no panic");
        seen.iter().filter(|body| *body != "probe").cloned().collect()
    }

    fn any(&self) -> bool {
        !self.0.lock().expect("no panic").is_empty()
    }
}

/// Kills the broker, which the test starts again.
fn crash() {
    let broker = std::env::var("BROKER_PID").expect("its process");
    let killed = std::process::Command::new("kill").args(["-KILL", &broker]).status();
    assert!(killed.is_ok_and(|status| status.success()));
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|number| number.to_string()).collect()
}
