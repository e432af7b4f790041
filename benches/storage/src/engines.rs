//! The engines behind one small trait.

use std::path::Path;

use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use redb::{ReadableDatabase, TableDefinition};

/// A key: queue, then sequence.
pub type Key = [u8; 12];

/// What the broker needs of a store.
pub trait Engine {
    const NAME: &'static str;
    fn open(folder: &Path) -> Self;
    /// All or nothing, and on disk when it returns.
    fn commit(&mut self, puts: &[(Key, &[u8])], removes: &[Key]);
    /// The next keys in order; their values are read too.
    fn read(&mut self, from: Key, most: usize) -> Vec<Key>;
}

pub struct Fjall {
    database: Database,
    messages: Keyspace,
}

impl Engine for Fjall {
    const NAME: &'static str = "fjall";

    fn open(folder: &Path) -> Self {
        let database = Database::builder(folder).open().expect("open");
        let messages = database.keyspace("messages", KeyspaceCreateOptions::default).expect("a keyspace");
        Self { database, messages }
    }

    fn commit(&mut self, puts: &[(Key, &[u8])], removes: &[Key]) {
        let mut batch = self.database.batch().durability(Some(PersistMode::SyncData));
        for (key, value) in puts {
            batch.insert(&self.messages, *key, *value);
        }
        for key in removes {
            batch.remove(&self.messages, *key);
        }
        batch.commit().expect("commit");
    }

    fn read(&mut self, from: Key, most: usize) -> Vec<Key> {
        let found = self.messages.range(from..).take(most);
        found
            .map(|entry| {
                let (key, value) = entry.into_inner().expect("an entry");
                std::hint::black_box(value);
                key.as_ref().try_into().expect("a key")
            })
            .collect()
    }
}

pub struct Redb(redb::Database);

const MESSAGES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("messages");

impl Engine for Redb {
    const NAME: &'static str = "redb";

    fn open(folder: &Path) -> Self {
        let database = redb::Database::create(folder.join("store.redb")).expect("open");
        let write = database.begin_write().expect("begin");
        write.open_table(MESSAGES).expect("a table");
        write.commit().expect("commit");
        Self(database)
    }

    fn commit(&mut self, puts: &[(Key, &[u8])], removes: &[Key]) {
        let write = self.0.begin_write().expect("begin");
        {
            let mut table = write.open_table(MESSAGES).expect("the table");
            for (key, value) in puts {
                table.insert(&key[..], *value).expect("insert");
            }
            for key in removes {
                table.remove(&key[..]).expect("remove");
            }
        }
        write.commit().expect("commit");
    }

    fn read(&mut self, from: Key, most: usize) -> Vec<Key> {
        let read = self.0.begin_read().expect("begin");
        let table = read.open_table(MESSAGES).expect("the table");
        let found = table.range(&from[..]..).expect("a range").take(most);
        found
            .map(|entry| {
                let (key, value) = entry.expect("an entry");
                std::hint::black_box(value.value());
                key.value().try_into().expect("a key")
            })
            .collect()
    }
}

/// Sixteen bits of queue and forty-eight of sequence: SQLite appends fastest by integer keys.
fn row(key: &Key) -> i64 {
    let queue = i64::from(key[3]);
    let sequence = i64::from_be_bytes(key[4..].try_into().expect("eight bytes"));
    queue << 48 | sequence
}

fn of_row(row: i64) -> Key {
    let mut key = [0; 12];
    key[3] = (row >> 48) as u8;
    key[4..].copy_from_slice(&(row & 0xffff_ffff_ffff).to_be_bytes());
    key
}

pub struct Sqlite(rusqlite::Connection);

impl Engine for Sqlite {
    const NAME: &'static str = "sqlite";

    fn open(folder: &Path) -> Self {
        let connection = rusqlite::Connection::open(folder.join("store.sqlite")).expect("open");
        connection
            .execute_batch(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -65536;
                 CREATE TABLE IF NOT EXISTS messages (key INTEGER PRIMARY KEY, value BLOB NOT NULL);",
            )
            .expect("a table");
        Self(connection)
    }

    fn commit(&mut self, puts: &[(Key, &[u8])], removes: &[Key]) {
        let transaction = self.0.transaction().expect("begin");
        {
            let mut insert = transaction.prepare_cached("INSERT INTO messages VALUES (?1, ?2)").expect("insert");
            for (key, value) in puts {
                insert.execute((row(key), value)).expect("insert");
            }
            let mut remove = transaction.prepare_cached("DELETE FROM messages WHERE key = ?1").expect("delete");
            for key in removes {
                remove.execute([row(key)]).expect("delete");
            }
        }
        transaction.commit().expect("commit");
    }

    fn read(&mut self, from: Key, most: usize) -> Vec<Key> {
        let sql = "SELECT key, value FROM messages WHERE key >= ?1 ORDER BY key LIMIT ?2";
        let mut select = self.0.prepare_cached(sql).expect("select");
        let found = select.query_map((row(&from), most as i64), |row| {
            std::hint::black_box(row.get::<_, Vec<u8>>(1)?);
            row.get::<_, i64>(0)
        });
        found.expect("rows").map(|key| of_row(key.expect("a row"))).collect()
    }
}
