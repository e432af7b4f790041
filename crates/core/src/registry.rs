//! Backends by name: a value that tests build afresh, or everything that is linked into the program.

use std::{collections::BTreeMap, fmt, sync::Arc};

use crate::{Backend, Bus, Error, ErrorKind, Result, config::nearest};

/// A backend that exists but may not be linked: tells "not compiled in" from "unknown". Submitted through
/// `inventory` by whoever offers backends as features.
#[derive(Debug, Clone, Copy)]
pub struct KnownBackend {
    /// The backend's name.
    pub name: &'static str,
    /// What to do to link it.
    pub hint: &'static str,
}

inventory::collect!(KnownBackend);

/// A linked backend; submitted with [`register_backend!`](crate::register_backend).
#[derive(Clone, Copy)]
pub struct BackendEntry {
    /// Makes the backend.
    pub make: fn() -> Arc<dyn Backend>,
}

impl fmt::Debug for BackendEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BackendEntry")
    }
}

inventory::collect!(BackendEntry);

/// Makes a backend known to every program that links the crate: `register_backend!(MyBackend);` for a type
/// that is [`Default`].
#[macro_export]
macro_rules! register_backend {
    ($backend:ty) => {
        $crate::__private::inventory::submit! {
            $crate::BackendEntry { make: || ::std::sync::Arc::new(<$backend as ::core::default::Default>::default()) }
        }
    };
}

/// Backends by name; names are compared without case.
#[derive(Clone, Default)]
pub struct Registry {
    backends: BTreeMap<&'static str, Arc<dyn Backend>>,
}

impl Registry {
    /// A registry without any backend.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Every backend that is linked into the program.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] when two linked crates claim one name.
    pub fn linked() -> Result<Self> {
        let mut registry = Self::new();
        for entry in inventory::iter::<BackendEntry> {
            registry.add((entry.make)())?;
        }
        Ok(registry)
    }

    /// Adds a backend.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] naming the name, alias or scheme that is taken and by whom.
    pub fn add(&mut self, backend: Arc<dyn Backend>) -> Result<()> {
        for known in self.backends.values() {
            let taken = names(backend.as_ref())
                .find(|name| names(known.as_ref()).any(|other| other.eq_ignore_ascii_case(name)));
            let scheme = || backend.schemes().iter().find(|scheme| known.schemes().contains(scheme));
            if let Some(taken) = taken.or_else(|| scheme().copied()) {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    format!(
                        "backend {:?} claims {taken:?}, which backend {:?} has already",
                        backend.name(),
                        known.name()
                    ),
                )
                .with_hint("register each backend once, under its own name"));
            }
        }
        self.backends.insert(backend.name(), backend);
        Ok(())
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.backends.keys().copied()
    }

    /// The backends, in order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Backend>> {
        self.backends.values()
    }

    /// The backend of this name, alias or URL scheme.
    ///
    /// # Errors
    /// [`ErrorKind::NotCompiledIn`] for a backend of this project that is not linked,
    /// [`ErrorKind::UnknownBackend`] for any other name, listing what is linked and guessing what was meant.
    pub fn backend(&self, name: &str) -> Result<&Arc<dyn Backend>> {
        let wanted = name.trim();
        let matches = |backend: &&Arc<dyn Backend>| {
            names(backend.as_ref())
                .chain(backend.schemes().iter().copied())
                .any(|known| known.eq_ignore_ascii_case(wanted))
        };
        self.backends.values().find(matches).ok_or_else(|| self.unknown(wanted))
    }

    /// A bus on the backend that the URL's scheme names, with the defaults of [`Bus::connect`].
    ///
    /// # Errors
    /// Those of [`Registry::backend`] and of [`BusBuilder::connect`](crate::BusBuilder::connect).
    pub async fn connect(&self, url: &str) -> Result<Bus> {
        Bus::builder().registry(self.clone()).url(url).connect().await
    }

    #[cold]
    fn unknown(&self, name: &str) -> Error {
        let linked = self.backends.keys().copied().collect::<Vec<_>>().join(", ");
        let lower = name.to_ascii_lowercase();
        let offered = |name: &str| inventory::iter::<KnownBackend>.into_iter().find(|known| known.name == name);
        if let Some(known) = offered(&lower) {
            return Error::new(
                ErrorKind::NotCompiledIn,
                format!("backend {lower:?} is not compiled in; linked: {linked}"),
            )
            .with_hint(known.hint);
        }
        let all = inventory::iter::<KnownBackend>.into_iter().map(|known| known.name);
        let error = Error::new(ErrorKind::UnknownBackend, format!("unknown backend {name:?}; linked: {linked}"));
        match nearest(name, self.backends.keys().copied().chain(all)) {
            Some(near) => match offered(near).filter(|_| !self.backends.contains_key(near)) {
                Some(known) => error.with_hint(format!("did you mean {near:?}? {}", known.hint)),
                None => error.with_hint(format!("did you mean {near:?}?")),
            },
            None => error.with_hint("choose one of the linked backends"),
        }
    }
}

fn names(backend: &dyn Backend) -> impl Iterator<Item = &'static str> {
    std::iter::once(backend.name()).chain(backend.aliases().iter().copied())
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.backends.keys()).finish()
    }
}
