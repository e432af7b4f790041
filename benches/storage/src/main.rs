//! Which embedded engine carries the broker: the same work on fjall, redb and SQLite, every commit synced to disk.
//!
//! The work is the broker's: messages are appended by queue and sequence, a group of them per commit (group commit);
//! a backlog is kept while the oldest are read and removed; then the store is opened again.

mod engines;

use std::time::{Duration, Instant};

use engines::{Engine, Fjall, Redb, Sqlite};

const BACKLOG: u64 = 100_000;

fn key(sequence: u64) -> [u8; 12] {
    let mut key = [0; 12];
    key[..4].copy_from_slice(&7_u32.to_be_bytes());
    key[4..].copy_from_slice(&sequence.to_be_bytes());
    key
}

/// Groups that were committed in the given time, as messages a second, and the longest commit.
fn rate(limit: Duration, group: u64, mut commit: impl FnMut()) -> (f64, Duration) {
    let (started, mut groups, mut worst) = (Instant::now(), 0_u64, Duration::ZERO);
    while started.elapsed() < limit {
        let one = Instant::now();
        commit();
        worst = worst.max(one.elapsed());
        groups += 1;
    }
    ((groups * group) as f64 / started.elapsed().as_secs_f64(), worst)
}

fn measure<E: Engine>(size: usize, seconds: u64) {
    let folder = tempfile::tempdir_in(".").expect("a folder");
    let body: Vec<u8> = (0..size).map(|_| fastrand::u8(..)).collect();
    let limit = Duration::from_secs(seconds);
    let mut engine = E::open(folder.path());
    let mut next = 0_u64;
    for group in [1, 16, 256] {
        let (rate, worst) = rate(limit, group, || {
            engine.commit(&(next..next + group).map(|n| (key(n), &body[..])).collect::<Vec<_>>(), &[]);
            next += group;
        });
        println!("{}\t{size}\tappend by {group}\t{rate:.0}/s\tlongest {worst:.1?}", E::NAME);
    }
    while next < BACKLOG {
        engine.commit(&(next..next + 1_000).map(|n| (key(n), &body[..])).collect::<Vec<_>>(), &[]);
        next += 1_000;
    }
    let mut oldest = 0_u64;
    for group in [1, 16, 256] {
        let (rate, worst) = rate(limit, group, || {
            let read = engine.read(key(oldest), group as usize);
            assert!(read.len() == group as usize && read[0] == key(oldest));
            engine.commit(&(next..next + group).map(|n| (key(n), &body[..])).collect::<Vec<_>>(), &read);
            oldest += group;
            next += group;
        });
        println!("{}\t{size}\tsend and take by {group}\t{rate:.0}/s\tlongest {worst:.1?}", E::NAME);
    }
    let left = next - oldest;
    drop(engine);
    let disk = disk(folder.path());
    let started = Instant::now();
    let mut engine = E::open(folder.path());
    let first = engine.read(key(0), 1);
    assert_eq!(first, [key(oldest)]);
    println!(
        "{}\t{size}\topen again\t{:.1?}\t{left} messages, {:.2} of their bytes on disk",
        E::NAME,
        started.elapsed(),
        disk as f64 / (left as f64 * size as f64)
    );
}

fn disk(folder: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(folder).expect("the folder").flatten();
    entries
        .map(|entry| {
            let about = entry.metadata().expect("an entry");
            if about.is_dir() { disk(&entry.path()) } else { std::os::unix::fs::MetadataExt::blocks(&about) * 512 }
        })
        .sum()
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let seconds = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(3);
    let only = arguments.next().unwrap_or_default();
    for size in [256, 4096] {
        for (name, measure) in [
            (Fjall::NAME, measure::<Fjall> as fn(usize, u64)),
            (Redb::NAME, measure::<Redb>),
            (Sqlite::NAME, measure::<Sqlite>),
        ] {
            if name.contains(&only) {
                measure(size, seconds);
            }
        }
    }
}
