//! Whether the files are what was written: looked at when the store is opened.
//!
//! Every message has a checksum, the engine's log has its own, and the engine checks the structure of its file. Small
//! files are checked in whole before anything is served; large ones while the broker serves already, so that a start
//! takes no longer the more there is.

use std::{fs::File, io::Read, path::Path};

use rusqlite::Connection;

use crate::{
    folder::Synced,
    store::{StoreError, told},
};

/// Files of up to so many bytes are checked before the broker serves.
pub(crate) const AT_ONCE: u64 = 128 << 20;

fn damaged(path: &Path, what: impl Into<String>) -> StoreError {
    StoreError::Damaged { path: path.to_owned(), what: what.into() }
}

/// What a message is stored with.
pub(crate) fn checksum(value: &[u8]) -> u32 {
    crc32fast::hash(value)
}

/// Reads everything: the structure by the engine's own check, the messages by their checksums.
pub(crate) fn whole(connection: &Connection, path: &Path) -> Result<(), StoreError> {
    let told = |cause: rusqlite::Error| told(path, &cause);
    let found: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(told)?;
    if found != "ok" {
        return Err(damaged(path, found));
    }
    for (table, key, one) in [("messages", "key", "message"), ("delayed", "id", "delayed message")] {
        sums(connection, path, (table, key, one))?;
    }
    Ok(())
}

/// Compares the checksums of one table.
fn sums(connection: &Connection, path: &Path, (table, key, one): (&str, &str, &str)) -> Result<(), StoreError> {
    let told = |cause: rusqlite::Error| told(path, &cause);
    // In pieces: while somebody reads, the engine's log can only grow.
    let sql = &format!("SELECT {key}, sum, value FROM {table} WHERE {key} > ?1 ORDER BY {key} LIMIT 4096");
    let mut select = connection.prepare(sql).map_err(told)?;
    let mut after = i64::MIN;
    loop {
        let mut rows = select.query([after]).map_err(told)?;
        let mut last = None;
        while let Some(row) = rows.next().map_err(told)? {
            let (key, sum): (i64, u32) = (row.get(0).map_err(told)?, row.get(1).map_err(told)?);
            let value = row.get_ref(2).map_err(told)?;
            if value.as_blob().map(checksum) != Ok(sum) {
                return Err(damaged(path, format!("{one} {key} is not what was stored")));
            }
            last = Some(key);
        }
        match last {
            Some(key) => after = key,
            None => return Ok(()),
        }
    }
}

/// The log that the engine writes before its file, as far as it is known to be on disk. At a frame that is not as
/// written the engine takes the log's end to be there, as after a power cut, and goes on without what follows.
pub(crate) fn log(path: &Path, synced: Option<Synced>) -> Result<(), StoreError> {
    let Some(Synced { salts, frames }) = synced else { return Ok(()) };
    let cut = || damaged(path, format!("it is cut: {frames} frames of it were on disk"));
    let unreadable = |cause: std::io::Error| damaged(path, format!("it cannot be read: {cause}"));
    let mut file = match File::open(path) {
        Ok(file) => std::io::BufReader::with_capacity(1 << 20, file),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Err(cut()),
        Err(cause) => return Err(unreadable(cause)),
    };
    let mut header = [0; 32];
    if !filled(&mut file, &mut header).map_err(unreadable)? {
        return Err(cut());
    }
    let number = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 4).map_or(0, |bytes| u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let big_endian = number(&header, 0) == 0x377f_0683;
    let mut sum = (number(&header, 24), number(&header, 28));
    let page = number(&header, 8) as usize;
    if mixed((0, 0), &header[..24], big_endian) != sum || !(512..=65_536).contains(&page) {
        return Err(damaged(path, "its head is not what was written"));
    }
    // Another log than the one that is known: it was begun anew and is not known yet.
    if header[16..24] != salts {
        return Ok(());
    }
    let mut frame = vec![0; 24 + page];
    for at in 0..frames {
        if !filled(&mut file, &mut frame).map_err(unreadable)? {
            return Err(cut());
        }
        let stored = (number(&frame, 16), number(&frame, 20));
        let ours = frame[8..16] == salts;
        if !ours || mixed(mixed(sum, &frame[..8], big_endian), &frame[24..], big_endian) != stored {
            return Err(damaged(path, format!("frame {at} of it is not what was written")));
        }
        sum = stored;
    }
    Ok(())
}

/// `false` at the end.
fn filled(file: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<bool> {
    match file.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(cause) if cause.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(cause) => Err(cause),
    }
}

/// SQLite's checksum of its log, over pairs of numbers.
fn mixed((mut one, mut two): (u32, u32), bytes: &[u8], big_endian: bool) -> (u32, u32) {
    let number = |bytes: &[u8]| {
        let bytes = [bytes[0], bytes[1], bytes[2], bytes[3]];
        if big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) }
    };
    for pair in bytes.chunks_exact(8) {
        one = one.wrapping_add(number(&pair[..4])).wrapping_add(two);
        two = two.wrapping_add(number(&pair[4..])).wrapping_add(one);
    }
    (one, two)
}
