use std::{path::Path, time::Duration};

use super::{Change, Key, Store, StoreError};
use crate::limits::Limits;

const QUEUE: u32 = 1;

fn open(folder: &Path) -> Store {
    Store::open(folder, &Limits { free_disk: 0, ..Limits::default() }).unwrap()
}

fn put(sequence: u64, value: Vec<u8>) -> Vec<Change> {
    let next = Change::Next { channel: QUEUE, sequence: sequence + 1 };
    vec![Change::Put(Key::new(QUEUE, sequence), value), next]
}

/// Ten messages that were answered.
async fn filled(folder: &Path) -> Store {
    let store = open(folder);
    store.store(vec![Change::Channel { id: QUEUE, kind: 1, name: "orders".into() }]).await.unwrap();
    for sequence in 1..=10 {
        store.store(put(sequence, vec![b'x'; 100])).await.unwrap();
    }
    store
}

fn sequences(store: &Store) -> Vec<u64> {
    store.read(QUEUE, 1, 100, usize::MAX).unwrap().into_iter().map(|(sequence, _)| sequence).collect()
}

async fn fails(store: &Store) {
    tokio::time::timeout(Duration::from_secs(30), store.failure()).await.unwrap();
}

/// What a power cut leaves: of the log what was synced, as the broker has noted it.
fn cut_power(folder: &Path) {
    let record = std::fs::read(folder.join("broker.lock")).unwrap();
    let frames = u64::from(u32::from_le_bytes(record[12..16].try_into().unwrap()));
    assert!(frames > 0);
    let log = std::fs::File::options().write(true).open(folder.join("broker.sqlite-wal")).unwrap();
    let synced = 32 + frames * (24 + 4096);
    assert!(log.metadata().unwrap().len() > synced, "something was written after it");
    log.set_len(synced).unwrap();
}

#[tokio::test]
async fn after_a_sync_that_failed_nothing_is_answered_or_folded() {
    let folder = tempfile::tempdir().unwrap();
    let store = filled(folder.path()).await;
    let file = folder.path().join("broker.sqlite");
    let before = std::fs::read(&file).unwrap();

    store.break_syncs(true);
    let refused = store.store(put(11, vec![b'x'; 5 << 20])).await.unwrap_err().to_string();
    assert!(refused.contains("cannot be synced: as the test wants it"), "{refused}");
    store.break_syncs(false);
    let again = store.store(put(12, vec![b'x'; 100])).await.unwrap_err().to_string();
    assert_eq!(again, refused, "whether the next sync works or not");
    assert_eq!(store.failed().unwrap().to_string(), refused);
    assert!(!store.is_alive());
    store.close();
    drop(store);
    assert_eq!(std::fs::read(&file).unwrap(), before);

    cut_power(folder.path());
    let store = open(folder.path());
    assert_eq!(sequences(&store), (1..=10).collect::<Vec<_>>());
    store.store(put(11, vec![b'x'; 100])).await.unwrap();
    store.close();
}

#[tokio::test]
async fn a_fold_that_cannot_sync_ends_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let store = filled(folder.path()).await;
    store.break_syncs(true);
    // Nobody waits for it, so only the fold syncs.
    store.remove(put(11, vec![b'x'; 5 << 20]), drop);
    fails(&store).await;
    store.break_syncs(false);
    let refused = store.store(put(12, vec![b'x'; 100])).await.unwrap_err();
    assert!(refused.to_string().contains("it or its log cannot be synced"), "{refused}");
    store.close();
    drop(store);
    cut_power(folder.path());
    assert_eq!(sequences(&open(folder.path())), (1..=10).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_stop_whose_record_cannot_be_synced_leaves_the_log_whole() {
    let folder = tempfile::tempdir().unwrap();
    let store = filled(folder.path()).await;
    let record = std::fs::read(folder.path().join("broker.lock")).unwrap();
    store.break_syncs(true);
    store.close();
    drop(store);
    // As after a power cut: what was not synced is not there.
    std::fs::write(folder.path().join("broker.lock"), record).unwrap();
    assert_eq!(sequences(&open(folder.path())), (1..=10).collect::<Vec<_>>());
}

#[tokio::test]
async fn what_is_stored_needs_its_channel() {
    let folder = tempfile::tempdir().unwrap();
    let store = filled(folder.path()).await;
    let delay = |id| vec![Change::Delay { id, channel: QUEUE, due: 1, value: b"x".into() }];
    store.store(delay(1)).await.unwrap();
    store.store(vec![Change::RemoveChannel(QUEUE)]).await.unwrap();
    for late in [put(11, b"x".into()), delay(2)] {
        assert!(matches!(store.store(late).await, Err(StoreError::Gone)));
    }
    assert_eq!((sequences(&store), store.delays().unwrap()), (Vec::new(), (None, 0, 0)));
    store.close();
}

#[tokio::test]
async fn what_is_owed_of_a_channel_goes_with_it() {
    let store = Store::in_memory(&Limits::default()).unwrap();
    let made = |id: u32| Change::Channel { id, kind: 1, name: id.to_string() };
    let mut first = put(1, b"old".into());
    first.splice(0..0, [made(QUEUE), made(2)]);
    store.store(first).await.unwrap();
    let pages = |most: &str| {
        let reads = super::lock(&store.0.reads);
        reads.query_row(&format!("PRAGMA max_page_count = {most}"), [], |_| Ok(())).unwrap();
    };
    pages("1");
    let large = vec![b'x'; 1 << 20];
    store.remove(vec![Change::Remove(Key::new(QUEUE, 1), 3), Change::Put(Key::new(2, 1), large)], drop);
    store.store(vec![Change::RemoveChannel(QUEUE)]).await.unwrap();
    let mut anew = put(1, b"new".into());
    anew.insert(0, made(QUEUE));
    store.store(anew).await.unwrap();
    pages("1000000");
    while store.read(2, 1, 1, 1).unwrap().is_empty() {
        store.store(Vec::new()).await.unwrap();
    }
    assert_eq!(store.read(QUEUE, 1, 9, 9).unwrap(), [(1, b"new".to_vec())], "the number is another channel's now");
}
