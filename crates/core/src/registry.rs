//! Backends by name: a value that tests build afresh, or everything that is linked into the program.

use std::{borrow::Borrow, collections::BTreeMap, fmt, ops::Deref, sync::Arc};

use crate::{Backend, Bus, Error, ErrorKind, Result, Settings, config::nearest};

/// A backend that exists but may not be linked: tells "not compiled in" from "unknown". Submitted through
/// `inventory` by whoever offers backends as features.
#[derive(Debug, Clone, Copy)]
pub struct KnownBackend {
    /// The backend's name.
    pub name: &'static str,
    /// Its other names and the schemes of its URLs.
    pub others: &'static [&'static str],
    /// What to do to link it.
    pub hint: &'static str,
}

impl KnownBackend {
    fn all_names(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.name).chain(self.others.iter().copied())
    }
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
    /// What two linked crates both claim; told to whoever asks for a backend.
    conflict: Option<String>,
}

impl Registry {
    /// A registry without any backend.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Every backend that is linked into the program. When two linked crates claim one name, choosing any backend is
    /// [`ErrorKind::Conflict`].
    #[must_use]
    pub fn linked() -> Self {
        let mut registry = Self::new();
        for entry in inventory::iter::<BackendEntry> {
            if let Err(error) = registry.add((entry.make)()) {
                registry.conflict = Some(error.message().to_owned());
            }
        }
        registry
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
                return Err(conflict(format!(
                    "backend {:?} claims {taken:?}, which backend {:?} has already",
                    backend.name(),
                    known.name()
                )));
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
    /// [`ErrorKind::UnknownBackend`] for any other name, listing what is linked and guessing what was meant;
    /// [`ErrorKind::Conflict`] when two linked crates claim one name.
    pub fn backend(&self, name: &str) -> Result<ChosenBackend> {
        if let Some(sentence) = &self.conflict {
            return Err(conflict(sentence.clone()));
        }
        let wanted = name.trim();
        let matches = |backend: &&Arc<dyn Backend>| {
            names(backend.as_ref())
                .chain(backend.schemes().iter().copied())
                .any(|known| known.eq_ignore_ascii_case(wanted))
        };
        let backend = self.backends.values().find(matches).ok_or_else(|| self.unknown(wanted))?;
        Ok(ChosenBackend { backend: Arc::clone(backend), registry: self.clone() })
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
        let known = || inventory::iter::<KnownBackend>.into_iter();
        let offered =
            |wanted: &str| known().find(|known| known.all_names().any(|name| name.eq_ignore_ascii_case(wanted)));
        if let Some(known) = offered(name) {
            return Error::new(
                ErrorKind::NotCompiledIn,
                format!("backend {lower:?} is not compiled in; linked: {linked}"),
            )
            .with_hint(known.hint);
        }
        let all = known().flat_map(KnownBackend::all_names);
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

/// A backend that was chosen by name: what it declares, and connections to it.
#[derive(Debug, Clone)]
pub struct ChosenBackend {
    backend: Arc<dyn Backend>,
    registry: Registry,
}

impl ChosenBackend {
    /// Connects with these settings; the environment feeds what they leave open.
    ///
    /// # Errors
    /// As [`BusBuilder::connect`](crate::BusBuilder::connect).
    pub async fn connect(&self, config: impl Borrow<Settings>) -> Result<Bus> {
        let builder = Bus::builder().registry(self.registry.clone()).backend(self.backend.name());
        builder.settings(config.borrow()).connect().await
    }
}

impl Deref for ChosenBackend {
    type Target = Arc<dyn Backend>;

    fn deref(&self) -> &Self::Target {
        &self.backend
    }
}

fn conflict(sentence: String) -> Error {
    Error::new(ErrorKind::Conflict, sentence).with_hint("register each backend once, under its own name")
}

fn names(backend: &dyn Backend) -> impl Iterator<Item = &'static str> {
    std::iter::once(backend.name()).chain(backend.aliases().iter().copied())
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.backends.keys()).finish()
    }
}
