//! What is logged while a case looks, by every crate of the process and at every level.

use std::{
    io,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use tracing_subscriber::{EnvFilter, Layer, filter::dynamic_filter_fn, fmt, layer::SubscriberExt};

use crate::cx::lock;

static LOOKING: AtomicBool = AtomicBool::new(false);
static TEXT: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// Takes the log of this process: to standard error as `RUST_LOG` says, and to the case that looks. `false` when somebody
/// else has taken it.
pub(crate) fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        let told = EnvFilter::builder().parse_lossy(std::env::var("RUST_LOG").unwrap_or_else(|_| "off".into()));
        let looked_at = dynamic_filter_fn(|_, _| LOOKING.load(Ordering::Relaxed));
        let subscriber = tracing_subscriber::registry()
            .with(fmt::layer().with_writer(io::stderr).with_filter(told))
            .with(fmt::layer().with_ansi(false).with_writer(|| Writer).with_filter(looked_at));
        tracing::subscriber::set_global_default(subscriber).is_ok()
    })
}

/// Looks at the log until it is dropped.
#[derive(Debug)]
pub(crate) struct Log(());

impl Log {
    pub(crate) fn look() -> Self {
        assert!(install(), "the log of this process is somebody else's: do not set a subscriber before the suite runs");
        lock(&TEXT).clear();
        LOOKING.store(true, Ordering::SeqCst);
        Self(())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&lock(&TEXT)).into_owned()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        LOOKING.store(false, Ordering::SeqCst);
        lock(&TEXT).clear();
    }
}

struct Writer;

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&TEXT).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
