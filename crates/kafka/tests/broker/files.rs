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
    let missing = [
        // The first transaction, for which there is no client yet.
        reader.settler().ack_and_send(taken[0].token, sends()).await,
        connection.consumer(&target, &ConsumeOptions::default()).await.map(drop),
        connection.declare(&Address::queue(name("new")), &ConsumeOptions::default()).await,
        connection.exists(&Address::topic(target.name()), Some("audit")).await.map(drop),
    ];
    for result in missing {
        let error = result.expect_err("nobody knows the password");
        assert!(error.retry() == Retry::Now && error.to_string().contains("pass_file"), "{error:?}");
    }

    appears().expect("written");
    reader.settler().ack_and_send(taken[0].token, sends()).await.expect("settled");
    let mut second = consumer(&connection, &target, ConsumeOptions::default()).await;
    take(&mut *second, 1).await;
    closed(connection.close().await);
}
