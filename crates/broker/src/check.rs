//! Whether the files are what was written: looked at when the store is opened.
//!
//! Every message has a checksum, the engine's log has its own, and the engine checks the structure of its file. Small
//! files are checked in whole before anything is served; large ones while the broker serves already, so that a start
//! takes no longer the more there is.

use std::{fs::File, io::Read, path::Path};

use rusqlite::Connection;

use crate::store::{StoreError, told};

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
    // In pieces: while somebody reads, the engine's log can only grow.
    let sql = "SELECT key, sum, value FROM messages WHERE key > ?1 ORDER BY key LIMIT 4096";
    let mut select = connection.prepare(sql).map_err(told)?;
    let mut after = i64::MIN;
    loop {
        let mut rows = select.query([after]).map_err(told)?;
        let mut last = None;
        while let Some(row) = rows.next().map_err(told)? {
            let (key, sum): (i64, u32) = (row.get(0).map_err(told)?, row.get(1).map_err(told)?);
            let value = row.get_ref(2).map_err(told)?;
            if value.as_blob().map(checksum) != Ok(sum) {
                return Err(damaged(path, format!("message {key} is not what was stored")));
            }
            last = Some(key);
        }
        match last {
            Some(key) => after = key,
            None => return Ok(()),
        }
    }
}

/// The log that the engine writes before its file. At a frame that is not as written the engine takes the log's end to
/// be there, as after a power cut. But a transaction is only begun when the one before is on disk: whatever follows
/// it proves that it was whole once.
pub(crate) fn log(path: &Path) -> Result<(), StoreError> {
    let unreadable = |cause: std::io::Error| damaged(path, format!("it cannot be read: {cause}"));
    let mut file = match File::open(path) {
        Ok(file) => std::io::BufReader::with_capacity(1 << 20, file),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(unreadable(cause)),
    };
    let mut header = [0; 32];
    if !filled(&mut file, &mut header).map_err(unreadable)? {
        return Ok(());
    }
    let number = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 4).map_or(0, |bytes| u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let big_endian = match number(&header, 0) {
        0x377f_0682 => false,
        0x377f_0683 => true,
        _ => return Err(damaged(path, "it does not begin as a log does")),
    };
    let mut sum = (number(&header, 24), number(&header, 28));
    if mixed((0, 0), &header[..24], big_endian) != sum {
        return Err(damaged(path, "its head is not what was written"));
    }
    let page = number(&header, 8) as usize;
    if !(512..=65_536).contains(&page) {
        return Err(damaged(path, "its head is not what was written"));
    }
    let mut frame = vec![0; 24 + page];
    let (mut broken, mut ended, mut position) = (None, false, 0_u64);
    while filled(&mut file, &mut frame).map_err(unreadable)? {
        let stored = (number(&frame, 16), number(&frame, 20));
        let ours = frame[8..16] == header[16..24];
        let whole = ours && mixed(mixed(sum, &frame[..8], big_endian), &frame[24..], big_endian) == stored;
        match broken {
            Some(at) if whole && ended => {
                return Err(damaged(path, format!("frame {at} of it is not what was written, and later ones are")));
            }
            None if !whole => broken = Some(position),
            _ => {}
        }
        ended |= broken.is_some() && ours && number(&frame, 4) != 0;
        (sum, position) = (stored, position + 1);
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
