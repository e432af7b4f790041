//! The layout of the file, and how it is opened for writing.

use std::path::Path;

use rusqlite::Connection;

use super::{StoreError, told};
use crate::limits::Limits;

/// The layout of the file. A file of another layout is refused.
const LAYOUT: i64 = 2;
/// Bytes beyond the limit of the store for what must be written all the same, such as returning a message.
const BEYOND: u64 = 64 << 20;

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS channels (
        id INTEGER PRIMARY KEY, kind INTEGER NOT NULL, name TEXT NOT NULL, next INTEGER NOT NULL, count INTEGER NOT NULL,
        bytes INTEGER NOT NULL, UNIQUE (kind, name));
    CREATE TABLE IF NOT EXISTS messages (key INTEGER PRIMARY KEY, sum INTEGER NOT NULL, value BLOB NOT NULL);
    CREATE TABLE IF NOT EXISTS delayed (
        id INTEGER PRIMARY KEY, channel INTEGER NOT NULL, due INTEGER NOT NULL, value BLOB NOT NULL);
    CREATE INDEX IF NOT EXISTS delayed_due ON delayed (due);
    CREATE TABLE IF NOT EXISTS positions (
        channel INTEGER NOT NULL, reader TEXT NOT NULL, next INTEGER NOT NULL, PRIMARY KEY (channel, reader)) WITHOUT ROWID;
";

/// Sets the file up, or refuses one of another layout.
pub(super) fn prepare(connection: &Connection, path: &Path, limits: &Limits) -> Result<(), StoreError> {
    let damaged = |what: String| StoreError::Damaged { path: path.to_owned(), what };
    let failed = |cause: rusqlite::Error| told(path, &cause);
    let number = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).map_err(failed);
    let (layout, tables) = (number("PRAGMA user_version")?, number("SELECT count(*) FROM sqlite_schema")?);
    if layout != LAYOUT && (layout, tables) != (0, 0) {
        return Err(damaged(format!("its layout is {layout}, expected {LAYOUT}: another program or release wrote it")));
    }
    let set = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -65536; PRAGMA wal_autocheckpoint = 4096; PRAGMA journal_size_limit = 67108864;";
    connection.execute_batch(set).map_err(failed)?;
    // What a crash has left in the log goes into the file, so that the log never holds what two crashes have left.
    number("PRAGMA wal_checkpoint(TRUNCATE)")?;
    if let Some(limit) = limits.store_bytes {
        let size = number("PRAGMA page_size")?.max(512).unsigned_abs();
        let pages = (limit.saturating_add(BEYOND) / size).min(u64::from(u32::MAX - 1));
        number(&format!("PRAGMA max_page_count = {pages}"))?;
    }
    let transaction = connection.unchecked_transaction().map_err(failed)?;
    transaction.execute_batch(TABLES).map_err(failed)?;
    transaction.pragma_update(None, "user_version", LAYOUT).map_err(failed)?;
    transaction.commit().map_err(failed)
}
