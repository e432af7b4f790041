//! The broker inside this process: one for each folder, shared by all connections, open until the process ends.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use futures_util::FutureExt;
use polymq_broker::{Broker, BrokerError, InProcess, StoreError};
use polymq_core::{Error, ErrorKind, Result};
use tokio::runtime::{Builder, Runtime};

use crate::NAME;

/// Brokers by their folders. They stay: a folder that was closed could be another process's at once, while a connection
/// that is just ending still writes.
static OPEN: LazyLock<Mutex<HashMap<PathBuf, Arc<Engine>>>> = LazyLock::new(Mutex::default);

/// A broker, and where its clock runs: a program's own runtime may end before another one's.
#[derive(Debug)]
struct Engine {
    broker: InProcess,
    _runtime: Runtime,
}

/// What answers the calls for a folder; blocks on files.
pub(crate) fn open(folder: &Path) -> Result<polymq_kubemq::InProcess> {
    let failed = |cause: &dyn std::fmt::Display| {
        Error::new(ErrorKind::Config, format!("the folder {folder:?} is not usable: {cause}"))
            .with_backend(NAME)
            .with_operation("connect")
            .with_hint("give a folder that this process may write, as embedded:///path or in \"path\"")
    };
    std::fs::create_dir_all(folder).map_err(|cause| failed(&cause))?;
    // One folder has many names, and one engine.
    let place = folder.canonicalize().map_err(|cause| failed(&cause))?;
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let engine = match open.get(&place) {
        Some(engine) => Arc::clone(engine),
        None => {
            let mut runtime = Builder::new_multi_thread();
            let runtime = runtime.worker_threads(1).thread_name("polymq-embedded").enable_time();
            let runtime = runtime.build().map_err(|cause| failed(&cause))?;
            let broker = {
                let _inside = runtime.enter();
                Broker::builder().data_dir(&place).in_process().map_err(|cause| refused(folder, cause))?
            };
            let engine = Arc::new(Engine { broker, _runtime: runtime });
            open.insert(place, Arc::clone(&engine));
            engine
        }
    };
    Ok(Arc::new(move |request| engine.broker.call(request).boxed()))
}

fn refused(folder: &Path, cause: BrokerError) -> Error {
    let error = match &cause {
        BrokerError::Store(StoreError::Busy { .. }) => Error::new(
            ErrorKind::Conflict,
            format!("the folder {folder:?} is in use by another process, and one process at a time can have it"),
        )
        .with_hint("stop the other process, choose another folder, or run `polymq broker` for both"),
        _ => Error::new(ErrorKind::Other, format!("the data in {folder:?} cannot be opened: {cause}")),
    };
    error.with_backend(NAME).with_operation("connect").with_source(cause)
}
