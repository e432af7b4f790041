//! What can be asked of the store.

use std::collections::HashMap;

use rusqlite::{OptionalExtension, params};

use super::{Key, Store, StoreError, StoredChannel, StoredDelay, lock, told};
use crate::check;

impl Store {
    /// Messages of a channel from a sequence on, at most so many and about so many bytes.
    ///
    /// # Errors
    ///
    /// [`StoreError::Failed`] or [`StoreError::Damaged`] when the file cannot be read.
    pub(crate) fn read(
        &self,
        channel: u32,
        from: u64,
        most: usize,
        bytes: usize,
    ) -> Result<Vec<(u64, Vec<u8>)>, StoreError> {
        let reads = lock(&self.0.reads);
        let found = (|| {
            let sql = "SELECT key, sum, value FROM messages WHERE key BETWEEN ?1 AND ?2 ORDER BY key";
            let mut select = reads.prepare_cached(sql)?;
            let mut rows = select.query(params![Key::new(channel, from).0, Key::new(channel, u64::MAX).0])?;
            let (mut found, mut size) = (Vec::new(), 0);
            while let Some(row) = rows.next()? {
                let sequence = Key(row.get(0)?).sequence();
                let value: Vec<u8> = row.get(2)?;
                if row.get::<_, u32>(1)? != check::checksum(&value) {
                    self.damaged(format!("message {sequence} of channel number {channel} is not what was stored"));
                    continue;
                }
                size += value.len();
                found.push((sequence, value));
                if size >= bytes || found.len() >= most {
                    break;
                }
            }
            Ok(found)
        })();
        found.map_err(|cause| told(&self.0.path, &cause))
    }

    fn damaged(&self, what: String) {
        tracing::error!(what, "a damaged message is passed over");
        let _ = self.0.damage.set(StoreError::Damaged { path: self.0.path.clone(), what });
    }

    /// Sequences of a channel from one on, and the bytes of each.
    ///
    /// # Errors
    ///
    /// As [`Store::read`].
    pub(crate) fn sizes(&self, channel: u32, from: u64, most: usize) -> Result<Vec<(u64, u64)>, StoreError> {
        let reads = lock(&self.0.reads);
        let found: rusqlite::Result<Vec<_>> = (|| {
            let sql = "SELECT key, length(value) FROM messages WHERE key BETWEEN ?1 AND ?2 ORDER BY key LIMIT ?3";
            let mut select = reads.prepare_cached(sql)?;
            let most = i64::try_from(most).unwrap_or(i64::MAX);
            let range = params![Key::new(channel, from).0, Key::new(channel, u64::MAX).0, most];
            select.query_map(range, |row| Ok((Key(row.get(0)?).sequence(), row.get(1)?)))?.collect()
        })();
        found.map_err(|cause| told(&self.0.path, &cause))
    }

    /// The last message of a channel.
    ///
    /// # Errors
    ///
    /// As [`Store::read`].
    pub(crate) fn last(&self, channel: u32) -> Result<Option<u64>, StoreError> {
        let reads = lock(&self.0.reads);
        let range = params![Key::new(channel, 0).0, Key::new(channel, u64::MAX).0];
        let found: rusqlite::Result<Option<i64>> =
            reads.query_row("SELECT max(key) FROM messages WHERE key BETWEEN ?1 AND ?2", range, |row| row.get(0));
        found.map(|key| key.map(|key| Key(key).sequence())).map_err(|cause| told(&self.0.path, &cause))
    }

    /// Every channel.
    ///
    /// # Errors
    ///
    /// As [`Store::read`].
    pub(crate) fn channels(&self) -> Result<Vec<StoredChannel>, StoreError> {
        let reads = lock(&self.0.reads);
        let found: rusqlite::Result<Vec<_>> = (|| {
            let mut select = reads.prepare("SELECT id, kind, name, next, count, bytes FROM channels ORDER BY id")?;
            let mut select_delayed = reads.prepare("SELECT channel, count(*) FROM delayed GROUP BY channel")?;
            let delayed = select_delayed.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            let delayed: HashMap<u32, u64> = delayed.collect::<rusqlite::Result<_>>()?;
            let mut first = reads.prepare("SELECT min(key) FROM messages WHERE key BETWEEN ?1 AND ?2")?;
            let rows = select.query_map([], |row| {
                let id: u32 = row.get(0)?;
                let range = params![Key::new(id, 0).0, Key::new(id, u64::MAX).0];
                let first: Option<i64> = first.query_row(range, |row| row.get(0))?;
                Ok(StoredChannel {
                    id,
                    kind: row.get(1)?,
                    name: row.get(2)?,
                    next: row.get(3)?,
                    count: row.get(4)?,
                    bytes: row.get(5)?,
                    delayed: delayed.get(&id).copied().unwrap_or_default(),
                    first: first.map(|key| Key(key).sequence()),
                })
            })?;
            rows.collect()
        })();
        found.map_err(|cause| told(&self.0.path, &cause))
    }

    /// Delayed messages that are due by a time, the earliest first: at most so many and about so many bytes.
    ///
    /// # Errors
    ///
    /// As [`Store::read`].
    pub(crate) fn due(&self, by: i64, most: usize, bytes: usize) -> Result<Vec<StoredDelay>, StoreError> {
        let reads = lock(&self.0.reads);
        let found = (|| {
            let sql = "SELECT id, channel, due, value, sum FROM delayed WHERE due <= ?1 ORDER BY due, id";
            let mut select = reads.prepare_cached(sql)?;
            let mut rows = select.query([by])?;
            let (mut found, mut size) = (Vec::new(), 0);
            while let Some(row) = rows.next()? {
                let (id, sum, value): (_, u32, Vec<u8>) = (row.get(0)?, row.get(4)?, row.get(3)?);
                let intact = check::checksum(&value) == sum;
                if !intact {
                    self.damaged(format!("delayed message {id} is not what was stored"));
                }
                size += value.len();
                found.push(StoredDelay { id, channel: row.get(1)?, due: row.get(2)?, value: intact.then_some(value) });
                if size >= bytes || found.len() >= most {
                    break;
                }
            }
            Ok(found)
        })();
        found.map_err(|cause| told(&self.0.path, &cause))
    }

    /// When the next delayed message is due, the highest number of one, and how many there are.
    ///
    /// # Errors
    ///
    /// As [`Store::read`].
    pub(crate) fn delays(&self) -> Result<(Option<i64>, u64, u64), StoreError> {
        let reads = lock(&self.0.reads);
        reads
            .query_row("SELECT min(due), coalesce(max(id), 0), count(*) FROM delayed", [], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?))
            })
            .map_err(|cause| told(&self.0.path, &cause))
    }

    /// Where a reader goes on.
    ///
    /// # Errors
    ///
    /// As [`Store::read`].
    pub(crate) fn position(&self, channel: u32, reader: &str) -> Result<Option<u64>, StoreError> {
        let reads = lock(&self.0.reads);
        let sql = "SELECT next FROM positions WHERE channel = ?1 AND reader = ?2";
        let found = reads.query_row(sql, params![channel, reader], |row| row.get(0)).optional();
        found.map_err(|cause| told(&self.0.path, &cause))
    }

    /// Readers of a channel, each with its next sequence and when it was seen, in nanoseconds since the Unix epoch.
    ///
    /// # Errors
    ///
    /// As [`Store::read`].
    pub(crate) fn readers(&self, channel: u32) -> Result<Vec<(String, u64, i64)>, StoreError> {
        let reads = lock(&self.0.reads);
        let found: rusqlite::Result<Vec<_>> = (|| {
            let mut select = reads.prepare_cached("SELECT reader, next, seen FROM positions WHERE channel = ?1")?;
            select.query_map([channel], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?.collect()
        })();
        found.map_err(|cause| told(&self.0.path, &cause))
    }

    /// Readers that were not seen since a time, each with its channel and when it was.
    ///
    /// # Errors
    ///
    /// As [`Store::read`].
    pub(crate) fn unseen(&self, since: i64) -> Result<Vec<(u32, String, i64)>, StoreError> {
        let reads = lock(&self.0.reads);
        let found: rusqlite::Result<Vec<_>> = (|| {
            let mut select = reads.prepare_cached("SELECT channel, reader, seen FROM positions WHERE seen < ?1")?;
            select.query_map([since], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?.collect()
        })();
        found.map_err(|cause| told(&self.0.path, &cause))
    }
}
