//! The thread that writes: one transaction for everybody who waits.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use rusqlite::{Connection, Transaction, params};
use tokio::sync::OwnedSemaphorePermit;

use super::{Change, Key, StoreError, change::SEQUENCE_BITS, lock, told};
use crate::{check, folder::Folder, room::Room};

/// Changes that one transaction takes at most, so that nobody waits long for others.
const GROUP: usize = 4096;
/// How often what the disk had no room for is tried again.
const AGAIN: Duration = Duration::from_millis(500);

/// Changes of one caller, who is told.
pub(super) struct Commit {
    pub(super) changes: Vec<Change>,
    pub(super) then: Then,
    /// When the disk is full, it waits for room instead of being refused.
    pub(super) lasting: bool,
    /// Bytes that count as waiting until the group is written.
    pub(super) _admitted: Option<OwnedSemaphorePermit>,
}

pub(super) type Then = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// The thread that writes.
pub(super) struct Writer {
    pub(super) path: PathBuf,
    pub(super) connection: Arc<Mutex<Connection>>,
    pub(super) room: Arc<Room>,
    /// Removals for which the disk had no room.
    pub(super) owed: Vec<Commit>,
    /// Whether a transaction is on disk when it has ended.
    pub(super) synced: bool,
    pub(super) done: Arc<Mutex<(u64, Duration)>>,
    pub(super) folder: Arc<Mutex<Option<Folder>>>,
}

impl Writer {
    pub(super) fn run(&mut self, waiting: &mpsc::Receiver<Commit>) {
        loop {
            let waits = self.room.is_full() || !self.owed.is_empty();
            let next = if waits {
                waiting.recv_timeout(AGAIN)
            } else {
                waiting.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected)
            };
            match next {
                Ok(first) => self.write_group(waiting, first),
                Err(mpsc::RecvTimeoutError::Timeout) => self.pay(),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
            self.room.measure(&lock(&self.connection));
        }
        self.pay();
        if !self.owed.is_empty() {
            let count = self.owed.len();
            tracing::error!(count, "the disk is full: messages that were acknowledged last come again after a restart");
        }
        // One file holds everything of a broker that was stopped.
        if let Some(folder) = &*lock(&self.folder) {
            let _ = folder.forget();
        }
        let folded = lock(&self.connection).query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
        if let Err(cause) = folded {
            tracing::debug!(%cause, "the log of the store stays beside its file; the next start reads it");
        }
    }

    /// One transaction for everybody who waits.
    fn write_group(&mut self, waiting: &mpsc::Receiver<Commit>, first: Commit) {
        let mut group = vec![first];
        let mut changes = group[0].changes.len();
        while changes < GROUP
            && let Ok(next) = waiting.try_recv()
        {
            changes += next.changes.len();
            group.push(next);
        }
        let started = Instant::now();
        let mut connection = lock(&self.connection);
        // Nobody waits for a removal: it is written, so no crash of the process undoes it, and synced with what comes
        // next. After a power cut, what was acknowledged last may come again.
        let synced = group.iter().any(|commit| !commit.lasting);
        let results: Vec<_> = match transact(
            &mut connection,
            (&mut self.synced, synced),
            group.iter().flat_map(|commit| &commit.changes),
        ) {
            Ok(()) => group.iter().map(|_| Ok(())).collect(),
            Err(cause) if group.len() == 1 => vec![Err(cause)],
            // One caller's changes must not fail the others'.
            Err(_) => group
                .iter()
                .map(|commit| transact(&mut connection, (&mut self.synced, synced), commit.changes.iter()))
                .collect(),
        };
        drop(connection);
        if synced
            && results.iter().any(std::result::Result::is_ok)
            && let Some(folder) = &*lock(&self.folder)
        {
            folder.remember();
        }
        {
            let mut done = lock(&self.done);
            *done = (done.0 + 1, done.1 + started.elapsed());
        }
        for (commit, result) in group.into_iter().zip(results) {
            match result.map_err(|cause| told(&self.path, &cause)) {
                Err(StoreError::Full) if commit.lasting => self.owed.push(commit),
                result => (commit.then)(result),
            }
        }
    }

    /// Tries again what the disk had no room for.
    fn pay(&mut self) {
        if self.owed.is_empty() {
            return;
        }
        let mut connection = lock(&self.connection);
        let result =
            transact(&mut connection, (&mut self.synced, false), self.owed.iter().flat_map(|commit| &commit.changes));
        drop(connection);
        match result.map_err(|cause| told(&self.path, &cause)) {
            Err(StoreError::Full) => {}
            result => self.owed.drain(..).for_each(|commit| (commit.then)(result.clone())),
        }
    }
}

/// What a transaction changes of a channel: known at its end, stored in one step.
#[derive(Default)]
struct Moved {
    next: u64,
    count: i64,
    bytes: i64,
}

type Channels = HashMap<u32, Moved>;

/// One transaction, synced or not; `was` is how it was with the one before.
fn transact<'a>(
    connection: &mut Connection,
    (was, synced): (&mut bool, bool),
    changes: impl Iterator<Item = &'a Change>,
) -> rusqlite::Result<()> {
    if *was != synced {
        connection.pragma_update(None, "synchronous", if synced { "FULL" } else { "NORMAL" })?;
        *was = synced;
    }
    let transaction = connection.transaction()?;
    let mut channels = Channels::new();
    for change in changes {
        apply(&transaction, change, &mut channels)?;
    }
    for (id, moved) in channels {
        let sql = "UPDATE channels SET next = max(next, ?2), count = count + ?3, bytes = bytes + ?4 WHERE id = ?1";
        let mut update = transaction.prepare_cached(sql)?;
        update.execute(params![id, moved.next, moved.count, moved.bytes])?;
    }
    transaction.commit()
}

fn apply(transaction: &Transaction<'_>, change: &Change, channels: &mut Channels) -> rusqlite::Result<()> {
    let run = |sql: &str, values: &[&dyn rusqlite::ToSql]| transaction.prepare_cached(sql)?.execute(values);
    match change {
        Change::Put(key, value) => {
            run("INSERT INTO messages VALUES (?1, ?2, ?3)", params![key.0, check::checksum(value), value])?;
            let moved = channels.entry(key.channel()).or_default();
            (moved.count, moved.bytes) = (moved.count + 1, moved.bytes + value.len().cast_signed() as i64);
        }
        Change::Remove(key, size) => {
            if run("DELETE FROM messages WHERE key = ?1", params![key.0])? > 0 {
                let moved = channels.entry(key.channel()).or_default();
                (moved.count, moved.bytes) = (moved.count - 1, moved.bytes - size.cast_signed() as i64);
            }
        }
        Change::RemoveRange { from, to, except } => {
            let moved = channels.entry(to.channel()).or_default();
            let channel = to.0 & !((1 << SEQUENCE_BITS) - 1);
            let mut from = from.0;
            for end in except.iter().map(|sequence| channel | sequence.cast_signed()).chain([to.0]) {
                let sql = "SELECT count(*), coalesce(sum(length(value)), 0) FROM messages WHERE key >= ?1 AND key < ?2";
                let mut select = transaction.prepare_cached(sql)?;
                let (count, bytes): (i64, i64) =
                    select.query_row(params![from, end], |row| Ok((row.get(0)?, row.get(1)?)))?;
                (moved.count, moved.bytes) = (moved.count - count, moved.bytes - bytes);
                run("DELETE FROM messages WHERE key >= ?1 AND key < ?2", params![from, end])?;
                from = end + 1;
            }
        }
        Change::Next { channel, sequence } => {
            let moved = channels.entry(*channel).or_default();
            moved.next = moved.next.max(*sequence);
        }
        Change::Channel { id, kind, name } => {
            run("INSERT INTO channels VALUES (?1, ?2, ?3, 1, 0, 0)", params![id, kind, name])?;
        }
        Change::RemoveChannel(id) => {
            let range = params![Key::new(*id, 0).0, Key::new(*id, u64::MAX).0];
            run("DELETE FROM messages WHERE key BETWEEN ?1 AND ?2", range)?;
            run("DELETE FROM delayed WHERE channel = ?1", params![id])?;
            run("DELETE FROM positions WHERE channel = ?1", params![id])?;
            run("DELETE FROM channels WHERE id = ?1", params![id])?;
            channels.remove(id);
        }
        Change::Delay { id, channel, due, value } => {
            run("INSERT INTO delayed VALUES (?1, ?2, ?3, ?4)", params![id, channel, due, value])?;
        }
        Change::Undelay(id) => {
            run("DELETE FROM delayed WHERE id = ?1", params![id])?;
        }
        Change::Position { channel, reader, next } => {
            run("INSERT OR REPLACE INTO positions VALUES (?1, ?2, ?3)", params![channel, reader, next])?;
        }
    }
    Ok(())
}
