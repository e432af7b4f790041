//! Which Rust type travels under which kind, version and serializer.

use std::{
    any::{TypeId, type_name},
    collections::HashMap,
    fmt,
};

use crate::{Address, ChannelKind, Error, ErrorKind, Result, headers::Text};

/// What a type is called on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kind {
    /// The logical type name.
    pub name: Text,
    /// The schema version; `None` takes and sends messages without one.
    pub version: Option<u32>,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.version {
            Some(version) => write!(f, "{} version {version}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// What `#[derive(Message)]` submits; by hand, call [`Kinds::bind`].
#[derive(Debug, Clone, Copy)]
pub struct KindEntry {
    /// The type.
    pub type_id: fn() -> TypeId,
    /// Its name in Rust, for errors.
    pub type_name: fn() -> &'static str,
    /// Its kind.
    pub name: &'static str,
    /// Its version.
    pub version: Option<u32>,
    /// Where its messages travel, if the type says so.
    pub channel: Option<(ChannelKind, &'static str)>,
}

inventory::collect!(KindEntry);

/// Kinds by Rust type: a value, or everything that is linked.
#[derive(Debug, Clone, Default)]
pub struct Kinds(HashMap<TypeId, Kind>);

impl Kinds {
    /// Nothing bound: every type travels without a kind.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Every type with `#[derive(Message)]` in the program.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] when two types claim one kind and version.
    pub fn linked() -> Result<Self> {
        let mut kinds = Self::new();
        for entry in inventory::iter::<KindEntry> {
            let kind = Kind { name: entry.name.into(), version: entry.version };
            kinds.insert((entry.type_id)(), (entry.type_name)(), kind)?;
        }
        Ok(kinds)
    }

    /// The channels that types with `#[derive(Message)]` name, each once.
    #[must_use]
    pub fn linked_channels() -> Vec<Address> {
        let named = inventory::iter::<KindEntry>.into_iter().filter_map(|entry| entry.channel);
        let mut channels: Vec<_> = named
            .map(|(kind, name)| match kind {
                ChannelKind::Queue => Address::queue(name),
                ChannelKind::Topic => Address::topic(name),
            })
            .collect();
        channels.sort();
        channels.dedup();
        channels
    }

    /// `T` travels as `name`, in this version if one is given.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] when the type has another kind, or another type has this one.
    pub fn bind<T: 'static>(&mut self, name: impl Into<Text>, version: impl Into<Option<u32>>) -> Result<()> {
        self.insert(TypeId::of::<T>(), type_name::<T>(), Kind { name: name.into(), version: version.into() })
    }

    fn insert(&mut self, type_id: TypeId, type_name: &str, kind: Kind) -> Result<()> {
        let taken = self.0.iter().any(|(other, known)| *other != type_id && *known == kind);
        let changed = self.0.get(&type_id).is_some_and(|known| *known != kind);
        if taken || changed {
            let why = if taken { "another type has that kind" } else { "it has another kind already" };
            return Err(Error::new(ErrorKind::Conflict, format!("{type_name} cannot be bound to {kind}: {why}"))
                .with_hint("give every type one kind and version of its own"));
        }
        self.0.insert(type_id, kind);
        Ok(())
    }

    /// The kind of a type, if it has one.
    #[must_use]
    pub fn get(&self, type_id: TypeId) -> Option<&Kind> {
        // Most programs bind nothing, and this is asked for every message sent.
        if self.0.is_empty() { None } else { self.0.get(&type_id) }
    }
}
