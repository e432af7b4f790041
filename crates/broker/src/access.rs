//! Tokens and rules together: who calls, and whether that one may do what it asks for.

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
};

use tonic::{Status, codegen::http::HeaderMap};

use crate::{
    counts::Counts,
    error::Result,
    refusal::Refusal,
    rules::{Action, Resource, Rules},
    tokens::{TokenAlgorithm, TokenKey},
};

/// Where the keys and rules are.
#[derive(Debug, Clone, Default)]
pub(crate) struct AccessFiles {
    pub(crate) token: Option<(TokenAlgorithm, PathBuf)>,
    pub(crate) rules: Option<PathBuf>,
}

#[derive(Debug, Default)]
struct Checks {
    key: Option<TokenKey>,
    rules: Option<Rules>,
}

impl AccessFiles {
    fn read(&self) -> Result<Checks> {
        let key = self.token.as_ref().map(|(algorithm, file)| TokenKey::read(*algorithm, file)).transpose()?;
        let rules = self.rules.as_deref().map(Rules::read).transpose()?;
        Ok(Checks { key, rules })
    }
}

/// What is checked; it can be read anew while the broker runs.
#[derive(Debug)]
pub(crate) struct Access {
    files: AccessFiles,
    counts: Counts,
    checks: RwLock<Arc<Checks>>,
}

impl Access {
    pub(crate) fn open(files: AccessFiles, counts: Counts) -> Result<Arc<Self>> {
        let checks = RwLock::new(Arc::new(files.read()?));
        Ok(Arc::new(Self { files, counts, checks }))
    }

    /// Reads the files anew. What it gives puts what was read in place.
    pub(crate) fn read(&self) -> Result<impl FnOnce()> {
        let checks = Arc::new(self.files.read()?);
        Ok(move || *self.checks.write().unwrap_or_else(PoisonError::into_inner) = checks)
    }

    fn checks(&self) -> Arc<Checks> {
        Arc::clone(&self.checks.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Who calls, by the token in the headers.
    pub(crate) fn caller(self: &Arc<Self>, headers: &HeaderMap) -> std::result::Result<Caller, Status> {
        let mut client = None;
        if let Some(key) = &self.checks().key {
            let token = headers.get("authorization");
            let token = token.ok_or_else(|| {
                self.counts.unauthenticated.add();
                Status::unauthenticated("Authorization token is not supplied")
            })?;
            let claims = token.to_str().map_err(|_| "token is malformed").and_then(|token| key.verify(token));
            let refused = |why| {
                self.counts.unauthenticated.add();
                tracing::debug!(why, "token refused");
                Status::unauthenticated(Refusal::authentication(why).to_string())
            };
            client = claims.map_err(refused)?.client_id.filter(|id| !id.is_empty());
        }
        Ok(Caller { access: Arc::clone(self), client: client.map(Into::into) })
    }
}

/// Who calls.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    access: Arc<Access>,
    /// What the token says; without it, what requests say.
    client: Option<Arc<str>>,
}

impl Caller {
    pub(crate) fn may(
        &self,
        action: Action,
        resource: Resource,
        client: &str,
        channel: &str,
    ) -> std::result::Result<(), Refusal> {
        if self.can(action, resource, client, channel) {
            return Ok(());
        }
        let client = self.client.as_deref().unwrap_or(client);
        tracing::debug!(client, channel, ?resource, ?action, "refused: no rule allows it");
        Err(self.denied())
    }

    /// As [`Caller::may`], for who asks for what it may do.
    pub(crate) fn can(&self, action: Action, resource: Resource, client: &str, channel: &str) -> bool {
        let client = self.client.as_deref().unwrap_or(client);
        self.access.checks().rules.as_ref().is_none_or(|rules| rules.allow(resource, client, channel, action))
    }

    /// Whether it may know that a channel is there, where requests do not say who asks.
    pub(crate) fn sees(&self, resource: Resource, channel: &str) -> bool {
        let client = self.client.as_deref();
        self.access.checks().rules.as_ref().is_none_or(|rules| rules.show(resource, client, channel))
    }

    /// Refused, and counted.
    pub(crate) fn denied(&self) -> Refusal {
        self.access.counts.denied.add();
        Refusal::access()
    }
}
