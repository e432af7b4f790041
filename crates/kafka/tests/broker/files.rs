//! Files that settings name, while somebody replaces them.

use polymq_core::{Address, Connection, ConsumeOptions, Message, Retry, Settings};

use crate::harness::{bare, closed, connect, consumer, name, producer, send, take};

/// The password is not there for a moment: what was handled is no dead letter, and no service ends.
pub async fn a_file_that_is_missing_for_a_moment_ends_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("password");
    let (appears, goes) = (|| std::fs::write(&file, "secret"), || std::fs::remove_file(&file));
    appears().expect("written");
    let url = format!("kafka://admin@{}?connect_timeout=60s", bare().servers);
    let settings = Settings::from_url(&url).expect("a URL").with("pass_file", file.display().to_string());
    let connection = connect(&settings).await;
    let (source, target) = (Address::queue(name("kept")), Address::queue(name("target")));
    connection.declare(&target, &ConsumeOptions::default()).await.expect("declare");
    let transactional = ConsumeOptions { transactional: true, ..ConsumeOptions::default() };
    let mut reader = consumer(&connection, &source, transactional).await;
    send(&*producer(&connection, &source).await, ["one".to_owned()]).await;
    let taken = take(&mut *reader, 1).await;

    goes().expect("removed");
    let sends = || vec![(target.clone(), Message::new("two").with_id("two"))];
    // The first transaction, for which there is no client yet; or there is one already, because positions are committed by it too.
    let settled = reader.settler().ack_and_send(taken[0].token, sends()).await;
    let missing = [
        ("consumer", connection.consumer(&target, &ConsumeOptions::default()).await.map(drop)),
        ("declare", connection.declare(&Address::queue(name("new")), &ConsumeOptions::default()).await),
        ("exists", connection.exists(&Address::topic(target.name()), Some("audit")).await.map(drop)),
    ];
    let missing = missing.map(|(what, result)| (what, result.expect_err(what)));
    for (what, error) in
        missing.iter().map(|(what, error)| (*what, error)).chain(settled.as_ref().err().map(|error| ("settle", error)))
    {
        assert!(error.retry() == Retry::Now && error.to_string().contains("pass_file"), "{what}: {error:?}");
    }

    appears().expect("written");
    if settled.is_err() {
        reader.settler().ack_and_send(taken[0].token, sends()).await.expect("settled");
    }
    let mut second = consumer(&connection, &target, ConsumeOptions::default()).await;
    take(&mut *second, 1).await;
    closed(connection.close().await);
}
