use std::{
    io,
    sync::{Arc, Mutex},
};

use polymq_core::Address;

use super::harness::*;

/// The broker gives a delivery a time, and looks every minute whether it is over.
pub async fn a_delivery_that_is_overdue_comes_again_and_the_log_says_why() {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_writer(move || writer.clone())
        .init();
    let broker = tokio::task::block_in_place(|| Broker::start_with("impatient", "consumer_timeout = 1000\n"));
    let stopped = StopOnDrop(&broker);
    let connection = connect(&broker.url()).await;
    let queue = Address::queue(unique("overdue"));
    send(&*producer(&connection, &queue).await, message("slow")).await.expect("sent");
    let mut consumer = consumer(&connection, &queue).await;
    let overdue = receive(&mut *consumer, 1).await.remove(0);
    let mut again = Vec::new();
    within(300, consumer.receive(1, &mut again)).await.expect("it comes again");
    assert_eq!(text(&again[0]), text(&overdue));
    assert!(consumer.settler().ack(overdue.token).await.is_err(), "it is not ours any more");
    consumer.settler().ack(again[0].token).await.expect("acknowledged");
    let told = String::from_utf8_lossy(&log.0.lock().expect("no panic")).into_owned();
    assert!(told.contains("consumer_timeout") && told.contains(queue.name()), "{told}");
    drop(stopped);
}

struct StopOnDrop<'a>(&'a Broker);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

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
