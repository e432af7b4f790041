//! Mission row J26, on the program itself.

#![allow(missing_docs)]

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

/// Ends with the test, whatever becomes of it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn j26_one_correlation_id_goes_through_three_services() {
    three_orders_are_shipped("memory", "memory://saga");
}

#[test]
#[cfg(feature = "embedded")]
fn j26_on_the_embedded_broker() {
    let folder = tempfile::tempdir().expect("a folder");
    three_orders_are_shipped("embedded", &format!("embedded://{}", folder.path().display()));
}

#[tokio::test(flavor = "multi_thread")]
#[cfg(feature = "kubemq")]
async fn j26_on_the_broker() {
    let broker = polymq_broker::Broker::builder().listen("127.0.0.1:0").start().await.expect("the broker");
    let url = format!("kubemq://{}", broker.address());
    let done = tokio::task::spawn_blocking(move || three_orders_are_shipped("kubemq", &url)).await;
    done.expect("as on the others");
    assert!(broker.stop().await.is_none(), "it ends well");
}

/// Three orders, and each service prints one line of each: under the order's id, and in the order of the steps.
fn three_orders_are_shipped(backend: &str, url: &str) {
    let program = Command::new(env!("CARGO_BIN_EXE_saga"))
        .env("POLYMQ_BACKEND", backend)
        .env("POLYMQ_URL", url)
        .stdout(Stdio::piped())
        .spawn();
    let mut running = Running(program.expect("the example starts"));
    let lines = BufReader::new(running.0.stdout.take().expect("its output")).lines().map_while(Result::ok);
    let mut sagas: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in lines.take(9) {
        let (saga, step) = line.split_once(": ").unwrap_or_else(|| panic!("no id: {line}"));
        sagas.entry(saga.to_owned()).or_default().push(step.to_owned());
    }
    let steps = |id: u64, cents: u64| {
        vec![
            format!("order {id} is taken"),
            format!("order {id} is paid, {cents} cents"),
            format!("order {id} is on its way"),
        ]
    };
    let expected = [(1, 950), (2, 2000), (3, 99)].map(|(id, cents)| (format!("saga-{id}"), steps(id, cents)));
    assert_eq!(sagas, BTreeMap::from(expected));
    let interrupted = Command::new("kill").args(["-INT", &running.0.id().to_string()]).status();
    assert!(interrupted.expect("kill").success());
    assert!(running.0.wait().expect("its end").success(), "Ctrl-C is no failure");
}
