use super::*;

async fn log() -> Arc<Log> {
    let limits = Limits::default();
    let store = Store::in_memory(&limits).unwrap();
    let numbers = Numbers::after(&[]);
    Logs::open(store, limits, numbers, Vec::new()).get("log").unwrap()
}

#[tokio::test]
async fn what_is_written_and_not_synced_is_not_read() {
    let log = log().await;
    let event = Event { channel: "log".into(), body: "x".into(), ..Event::default() };
    log.append(event).await.unwrap().await.unwrap().unwrap();
    // As it is between the transaction and its sync.
    let written = EventReceive { sequence: 2, ..EventReceive::default() }.encode_to_vec();
    log.store.store(vec![Change::Put(Key::new(log.id, 2), written)]).await.unwrap();
    let read: Vec<_> = log.wait(1).await.unwrap().iter().map(|event| event.sequence).collect();
    assert_eq!(read, [1]);
    assert!(futures_util::poll!(std::pin::pin!(log.wait(2))).is_pending());
}
