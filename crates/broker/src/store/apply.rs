//! What changes do to the tables.

use std::collections::HashMap;

use rusqlite::{Connection, Transaction, params};

use super::{Change, Key};
use crate::check;

/// What a transaction changes of a channel: known at its end, stored in one step.
#[derive(Default)]
struct Moved {
    next: u64,
    count: i64,
    bytes: i64,
}

/// The channel is not there, or what was delayed for it.
const GONE: rusqlite::Error = rusqlite::Error::StatementChangedRows(0);

type Channels = HashMap<u32, Moved>;

/// One transaction.
pub(super) fn transact<'a>(
    connection: &mut Connection,
    changes: impl Iterator<Item = &'a Change>,
) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    let mut channels = Channels::new();
    for change in changes {
        apply(&transaction, change, &mut channels)?;
    }
    for (id, moved) in channels {
        let sql = "UPDATE channels SET next = max(next, ?2), count = count + ?3, bytes = bytes + ?4 WHERE id = ?1";
        let mut update = transaction.prepare_cached(sql)?;
        // What is put into a channel that is not there would be lost at the next start, or come out of another channel.
        if update.execute(params![id, moved.next, moved.count, moved.bytes])? == 0 && moved.next > 0 {
            return Err(GONE);
        }
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
        Change::RemoveRange { from, to } => {
            let moved = channels.entry(to.channel()).or_default();
            let sql = "SELECT count(*), coalesce(sum(length(value)), 0) FROM messages WHERE key >= ?1 AND key < ?2";
            let mut select = transaction.prepare_cached(sql)?;
            let (count, bytes): (i64, i64) =
                select.query_row(params![from.0, to.0], |row| Ok((row.get(0)?, row.get(1)?)))?;
            (moved.count, moved.bytes) = (moved.count - count, moved.bytes - bytes);
            run("DELETE FROM messages WHERE key >= ?1 AND key < ?2", params![from.0, to.0])?;
        }
        Change::Next { channel, sequence } => {
            let moved = channels.entry(*channel).or_default();
            moved.next = moved.next.max(*sequence);
        }
        Change::Channel { id, kind, name } => {
            let sql = "INSERT INTO channels VALUES (?1, ?2, ?3, 1, 0, 0) ON CONFLICT (id) DO NOTHING";
            run(sql, params![id, kind, name])?;
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
            let sql = "INSERT INTO delayed SELECT ?1, id, ?3, ?4, ?5 FROM channels WHERE id = ?2";
            if run(sql, params![id, channel, due, value, check::checksum(value)])? == 0 {
                return Err(GONE);
            }
        }
        Change::Undelay(id) => {
            // What is put in its place would be there twice.
            if run("DELETE FROM delayed WHERE id = ?1", params![id])? == 0 {
                return Err(GONE);
            }
        }
        Change::Position { channel, reader, place, seen } => {
            // A reader may go on a moment longer than its channel, whose number may be another one's some day.
            let sql = "INSERT OR REPLACE INTO positions SELECT id, ?2, ?3, ?4 FROM channels WHERE id = ?1";
            run(sql, params![channel, reader, place.take(), seen])?;
        }
        Change::Seen { channel, reader, seen } => {
            let sql = "UPDATE positions SET seen = ?3 WHERE channel = ?1 AND reader = ?2";
            run(sql, params![channel, reader, seen])?;
        }
        Change::RemovePosition { channel, reader } => {
            run("DELETE FROM positions WHERE channel = ?1 AND reader = ?2", params![channel, reader])?;
        }
    }
    Ok(())
}
