use super::*;

fn logs() -> Logs {
    let limits = Limits::default();
    let store = Store::in_memory(&limits).unwrap();
    let numbers = Numbers::after(&[]);
    Logs::open(store, limits, numbers, Vec::new())
}

fn log() -> Arc<Log> {
    logs().get("log").unwrap()
}

fn event() -> Event {
    Event { channel: "log".into(), body: "x".into(), ..Event::default() }
}

/// Stores so many events.
async fn fill(log: &Arc<Log>, count: usize) {
    let mut last = None;
    for _ in 0..count {
        last = Some(log.append(event()).await.unwrap());
    }
    last.unwrap().await.unwrap().unwrap();
}

#[tokio::test]
async fn what_is_written_and_not_synced_is_not_read() {
    let log = log();
    fill(&log, 1).await;
    // As it is between the transaction and its sync.
    let written = EventReceive { sequence: 2, ..EventReceive::default() }.encode_to_vec();
    log.store.store(vec![Change::Put(Key::new(log.id, 2), written)]).await.unwrap();
    let read: Vec<_> = log.wait(1).await.unwrap().iter().map(|event| event.sequence).collect();
    assert_eq!(read, [1]);
    assert!(futures_util::poll!(std::pin::pin!(log.wait(2))).is_pending());
}

#[tokio::test]
async fn a_long_log_is_removed_in_steps() {
    let logs = logs();
    let log = logs.get("log").unwrap();
    fill(&log, 5000).await;
    // The store stores nothing for now, so that the removal comes no further than its first step.
    let (free, waits) = std::sync::mpsc::channel::<()>();
    log.store.commit(Vec::new(), None, move |_| _ = waits.recv());
    let mut removal = std::pin::pin!(logs.remove("log"));
    assert!(futures_util::poll!(removal.as_mut()).is_pending());
    drop(free);
    // Handed over after the removal began, and stored before that is done.
    fill(&log, 1).await;
    let stored = log.store.channels().unwrap();
    assert_eq!(stored.iter().map(|channel| channel.count).collect::<Vec<_>>(), [5001 - 2048]);
    assert!(removal.await.unwrap());
    assert!(log.store.channels().unwrap().is_empty());
    assert!(log.store.sizes(log.id, 1, 10).unwrap().is_empty());
    assert!(matches!(log.wait(1).await, Err(StoreError::Gone)));
}

/// Else retention would take so many more events away as nobody has counted.
#[tokio::test]
async fn a_removal_that_is_given_up_has_counted_what_it_has_removed() {
    let logs = logs();
    let log = logs.get("log").unwrap();
    fill(&log, 5000).await;
    for left in [5000 - 2048, 5000 - 2 * 2048] {
        let (free, waits) = std::sync::mpsc::channel::<()>();
        log.store.commit(Vec::new(), None, move |_| _ = waits.recv());
        assert!(futures_util::poll!(std::pin::pin!(logs.remove("log"))).is_pending());
        drop(free);
        // Who comes next begins when the step is done.
        drop(log.steps.lock().await);
        assert_eq!(log.kept.size().0, left);
        assert_eq!(log.store.channels().unwrap()[0].count, left);
    }
}

#[tokio::test]
async fn who_reads_much_leaves_one_note_to_the_store() {
    // More than the store writes in three transactions.
    const EVENTS: u64 = 3 * 4096;
    let logs = logs();
    let log = logs.get("log").unwrap();
    fill(&log, usize::try_from(EVENTS).unwrap()).await;
    let begin = |client: &str| Reader::begin(Arc::clone(&log), readers::name(client, ""), 1);
    let (mut one, mut other) = (begin("one").await.unwrap(), begin("other").await.unwrap());
    log.store.written().await.unwrap();
    let before = log.store.commits().0;
    // The store stores nothing while they read.
    let ((holds, is_held), (free, waits)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
    log.store.commit(Vec::new(), None, move |_| {
        let _ = holds.send(());
        let _ = waits.recv();
    });
    is_held.recv().unwrap();
    for sequence in 1..=EVENTS {
        assert_eq!(one.next().await.unwrap().sequence, sequence);
        assert_eq!(other.next().await.unwrap().sequence, sequence);
    }
    let names = [&one, &other].map(|reader| reader.name().to_owned());
    drop((one, other));
    drop(free);
    log.store.written().await.unwrap();
    // The one that held it up, what the readers have noted, and perhaps one that only waits for it.
    let transactions = log.store.commits().0 - before;
    assert!(transactions <= 3, "{transactions} transactions");
    for name in names {
        assert_eq!(log.store.position(log.id, &name).unwrap(), Some(EVENTS + 1));
    }
}

/// A crash takes along what has not left yet: its reader must get it again.
#[tokio::test]
async fn what_was_given_a_moment_ago_is_not_stored_as_read() {
    let log = log();
    fill(&log, 2).await;
    let mut reader = Reader::begin(Arc::clone(&log), readers::name("one", ""), 1).await.unwrap();
    let place = async || {
        log.store.written().await.unwrap();
        log.store.position(log.id, &readers::name("one", "")).unwrap().unwrap()
    };
    for sequence in 1..=2 {
        assert_eq!(reader.next().await.unwrap().sequence, sequence);
        // Nobody has asked for what comes next since then.
        assert_eq!(place().await, 1, "{sequence} was given");
    }
    // Two of its times, of which the second began when the first had ended.
    while place().await < 3 {
        let more = tokio::time::timeout(Duration::from_millis(100), reader.next()).await;
        assert!(more.is_err(), "{more:?}");
    }
    drop(reader);
    let mut again = Reader::begin(Arc::clone(&log), readers::name("one", ""), 1).await.unwrap();
    fill(&log, 1).await;
    assert_eq!(again.next().await.unwrap().sequence, 3);
    drop(again);
    assert_eq!(place().await, 4, "who goes has got what it was given");
}
