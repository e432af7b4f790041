//! Whether there is room for more messages, by the store's own limit and by what the disk has left.
//!
//! Only what brings messages in is refused, and before the disk is full to the last byte: settling, which writes too,
//! goes on in what is kept free for it.

use std::{
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use rusqlite::Connection;

use crate::store::StoreError;

#[derive(Debug)]
pub(crate) struct Room {
    /// Bytes that the store may have.
    limit: Option<u64>,
    /// Bytes of the disk that are kept free, and a folder on it.
    free: Option<(u64, PathBuf)>,
    used: AtomicU64,
    is_full: AtomicBool,
    refusal: Mutex<Option<StoreError>>,
}

impl Room {
    pub(crate) fn new(limit: Option<u64>, free: Option<(u64, PathBuf)>) -> Self {
        Self { limit, free, used: AtomicU64::new(0), is_full: AtomicBool::new(false), refusal: Mutex::new(None) }
    }

    /// Bytes of the store that are in use.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.is_full.load(Ordering::Relaxed)
    }

    /// Whether each transaction may change the answer.
    pub(crate) fn is_tight(&self) -> bool {
        self.limit.is_some() || self.is_full()
    }

    /// Why nothing may come in at present.
    pub(crate) fn refusal(&self) -> Option<StoreError> {
        if !self.is_full() {
            return None;
        }
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks anew. When that fails, it is as it was: the next write tells what is wrong.
    pub(crate) fn measure(&self, connection: &Connection) {
        let pragma = |sql: &str| {
            let value = connection.prepare_cached(sql).and_then(|mut pragma| pragma.query_row([], |row| row.get(0)));
            value.unwrap_or(0_u64)
        };
        let pages = pragma("PRAGMA page_count").saturating_sub(pragma("PRAGMA freelist_count"));
        let used = pages * pragma("PRAGMA page_size");
        self.used.store(used, Ordering::Relaxed);
        let refusal = match (&self.limit, &self.free) {
            (Some(limit), _) if used >= *limit => Some(StoreError::Limit { limit: *limit }),
            (_, Some((keep, folder))) if fs4::available_space(folder).is_ok_and(|free| free < *keep) => {
                Some(StoreError::Full)
            }
            _ => None,
        };
        if refusal.is_some() != self.is_full() {
            match &refusal {
                Some(why) => tracing::warn!(%why, used, "messages are refused until there is room"),
                None => tracing::info!(used, "there is room again: messages are taken"),
            }
        }
        self.is_full.store(refusal.is_some(), Ordering::Relaxed);
        *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = refusal;
    }
}
