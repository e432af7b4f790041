//! No log, at any level, holds the password: the client library logs every frame that it writes, the login too.

#![allow(missing_docs)]

use std::{
    io,
    sync::{Arc, Mutex},
};

use polymq_amqp::AmqpConnection;
use polymq_core::{Connection, ErrorKind, Settings};
use polymq_testkit::{Broker, BrokerControl};

const PASSWORD: &str = "hush-7-hush";

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn no_log_holds_the_password() {
    let log = Log::default();
    let writer = log.clone();
    // For the whole process: the client library logs on a thread of its own.
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .init();
    let broker = Broker::rabbitmq();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let wrong = format!("amqp://guest:{PASSWORD}@{}?connect_timeout=60s", broker.address());
        let settings = Settings::from_url(&wrong).expect("a URL");
        let error = AmqpConnection::connect(&settings).await.expect_err("not the password");
        assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error}");
        assert!(!format!("{error} {error:?}").contains(PASSWORD));
        let right = format!("amqp://guest:guest@{}?connect_timeout=60s", broker.address());
        let right = Settings::from_url(&right).expect("a URL");
        let connection = AmqpConnection::connect(&right).await.expect("a connection");
        connection.ping().await.expect("logged in");
        connection.close().await.expect("closed");
    });
    let log = String::from_utf8_lossy(&log.0.lock().expect("no panic")).into_owned();
    // The frame is there, in bytes like these, so the log is what it is taken for.
    let blank = format!("response: LongString({:?})", [0xff; "\0guest\0".len() + PASSWORD.len()]);
    assert!(
        log.contains("StartOk") && log.contains(&blank),
        "no frame of a login: {:?}",
        log.lines().find(|line| line.contains("StartOk"))
    );
    let bytes = format!("{:?}", PASSWORD.as_bytes());
    for secret in [PASSWORD, bytes.trim_matches(['[', ']']), &format!("{:?}", b"\0guest\0guest")] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}
