//! The layout of the file, and how it is opened for writing.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{StoreError, told};
use crate::{check, limits::Limits};

/// The layout of the file. A file of another layout is refused.
const LAYOUT: i64 = 4;
/// Older layouts that are made into it, each with what the next one has more.
const BEFORE: [(i64, &str); 2] = [
    (2, "ALTER TABLE positions ADD COLUMN seen INTEGER NOT NULL DEFAULT 0"),
    (3, "ALTER TABLE delayed ADD COLUMN sum INTEGER NOT NULL DEFAULT 0"),
];
/// Bytes beyond the limit of the store for what must be written all the same, such as returning a message.
const BEYOND: u64 = 64 << 20;

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS channels (
        id INTEGER PRIMARY KEY, kind INTEGER NOT NULL, name TEXT NOT NULL, next INTEGER NOT NULL, count INTEGER NOT NULL,
        bytes INTEGER NOT NULL, UNIQUE (kind, name));
    CREATE TABLE IF NOT EXISTS messages (key INTEGER PRIMARY KEY, sum INTEGER NOT NULL, value BLOB NOT NULL);
    CREATE TABLE IF NOT EXISTS delayed (
        id INTEGER PRIMARY KEY, channel INTEGER NOT NULL, due INTEGER NOT NULL, value BLOB NOT NULL,
        sum INTEGER NOT NULL DEFAULT 0);
    CREATE INDEX IF NOT EXISTS delayed_due ON delayed (due);
    CREATE TABLE IF NOT EXISTS positions (
        channel INTEGER NOT NULL, reader TEXT NOT NULL, next INTEGER NOT NULL, seen INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (channel, reader)) WITHOUT ROWID;
";

/// Sets the file up, or refuses one of another layout.
pub(super) fn prepare(connection: &Connection, path: &Path, limits: &Limits) -> Result<(), StoreError> {
    let damaged = |what: String| StoreError::Damaged { path: path.to_owned(), what };
    let failed = |cause: rusqlite::Error| told(path, &cause);
    let number = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).map_err(failed);
    let (layout, tables) = (number("PRAGMA user_version")?, number("SELECT count(*) FROM sqlite_schema")?);
    let known = layout == LAYOUT || BEFORE.iter().any(|(before, _)| *before == layout);
    if !known && (layout, tables) != (0, 0) {
        return Err(damaged(format!("its layout is {layout}, expected {LAYOUT}: another program or release wrote it")));
    }
    // The writer syncs the log itself, and says when it goes into the file.
    let set = "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA cache_size = -65536; PRAGMA wal_autocheckpoint = 0; PRAGMA journal_size_limit = 67108864;";
    connection.execute_batch(set).map_err(failed)?;
    connection.set_prepared_statement_cache_capacity(32);
    // What a crash has left in the log goes into the file, so that the log never holds what two crashes have left.
    number("PRAGMA wal_checkpoint(TRUNCATE)")?;
    if let Some(limit) = limits.store_bytes {
        let size = number("PRAGMA page_size")?.max(512).unsigned_abs();
        let pages = (limit.saturating_add(BEYOND) / size).min(u64::from(u32::MAX - 1));
        number(&format!("PRAGMA max_page_count = {pages}"))?;
    }
    let transaction = connection.unchecked_transaction().map_err(failed)?;
    for (_, more) in BEFORE.iter().filter(|(before, _)| layout != 0 && layout <= *before) {
        transaction.execute_batch(more).map_err(failed)?;
    }
    if layout != 0 && layout < LAYOUT {
        sum_delayed(&transaction).map_err(failed)?;
    }
    transaction.execute_batch(TABLES).map_err(failed)?;
    transaction.pragma_update(None, "user_version", LAYOUT).map_err(failed)?;
    transaction.commit().map_err(failed)
}

/// Gives each delayed message its checksum.
fn sum_delayed(connection: &Connection) -> rusqlite::Result<()> {
    let mut select = connection.prepare("SELECT id, value FROM delayed WHERE id > ?1 ORDER BY id LIMIT 1")?;
    let mut update = connection.prepare("UPDATE delayed SET sum = ?2 WHERE id = ?1")?;
    let mut last = i64::MIN;
    let mut next = |after: i64| {
        let row = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, check::checksum(row.get_ref(1)?.as_blob()?)));
        select.query_row([after], row).optional()
    };
    while let Some((id, sum)) = next(last)? {
        update.execute(params![id, sum])?;
        last = id;
    }
    Ok(())
}
