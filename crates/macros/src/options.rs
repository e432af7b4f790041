//! What the attributes have in common: `name`, `name = value` and `name(values)`, each checked where it is written.

use std::collections::HashMap;

use proc_macro2::{Ident, Span};
use quote::ToTokens;
use syn::{
    Error, Expr, ExprLit, Lit, LitStr, Path, Result, Token,
    ext::IdentExt,
    parse::{Parse, ParseStream},
    punctuated::Punctuated,
    token::Paren,
};

/// One option as it was written.
pub(crate) struct Given {
    pub(crate) name: Ident,
    pub(crate) value: Value,
}

/// What follows the name of an option.
pub(crate) enum Value {
    None,
    Expr(Expr),
    List(Vec<Expr>),
}

impl Parse for Given {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let name = Ident::parse_any(input)?;
        let value = if input.peek(Token![=]) {
            input.parse::<Token![=]>()?;
            if input.is_empty() || input.peek(Token![,]) {
                return Err(Error::new(name.span(), format!("`{name}` has no value after its `=`")));
            }
            Value::Expr(input.parse()?)
        } else if input.peek(Paren) {
            let content;
            syn::parenthesized!(content in input);
            Value::List(Punctuated::<Expr, Token![,]>::parse_terminated(&content)?.into_iter().collect())
        } else {
            Value::None
        };
        Ok(Self { name, value })
    }
}

/// Options by name, each taken once; what was not taken is unknown.
pub(crate) struct Options {
    given: Vec<Given>,
    known: &'static [&'static str],
}

impl Options {
    /// Reads the options; `known` is every name, those in `repeatable` may come more than once.
    pub(crate) fn parse(input: ParseStream<'_>, known: &'static [&'static str], repeatable: &[&str]) -> Result<Self> {
        let given: Vec<Given> = Punctuated::<Given, Token![,]>::parse_terminated(input)?.into_iter().collect();
        let mut seen = HashMap::new();
        let mut problems = Problems::default();
        for Given { name, .. } in &given {
            let text = name.to_string();
            if !known.contains(&text.as_str()) {
                problems.add(Error::new(name.span(), unknown(&text, known)));
            } else if !repeatable.contains(&text.as_str()) && seen.insert(text, ()).is_some() {
                problems.add(Error::new(name.span(), format!("`{name}` is given twice; keep one of them")));
            }
        }
        problems.into_result().map(|()| Self { given, known })
    }

    /// Where an option was written.
    pub(crate) fn span(&self, name: &str) -> Option<Span> {
        debug_assert!(self.known.contains(&name));
        self.find(name).map(|given| given.name.span())
    }

    fn find(&self, name: &str) -> Option<&Given> {
        self.given.iter().find(|given| given.name == name)
    }

    /// A word without a value.
    pub(crate) fn flag(&self, name: &str) -> Result<bool> {
        match self.find(name) {
            None => Ok(false),
            Some(Given { value: Value::None, .. }) => Ok(true),
            Some(given) => Err(Error::new(given.name.span(), format!("`{name}` takes no value: write `{name}` alone"))),
        }
    }

    fn expr(&self, name: &str, expected: &str) -> Result<Option<&Expr>> {
        match self.find(name) {
            None => Ok(None),
            Some(Given { value: Value::Expr(expr), .. }) => Ok(Some(expr)),
            Some(given) => Err(Error::new(given.name.span(), format!("`{name}` needs {expected}"))),
        }
    }

    /// Any expression.
    pub(crate) fn any(&self, name: &str, example: &str) -> Result<Option<&Expr>> {
        self.expr(name, &format!("a value: {name} = {example}"))
    }

    /// A whole number above zero, or an expression that the compiler checks.
    pub(crate) fn number(&self, name: &str, example: &str) -> Result<Option<&Expr>> {
        let expected = format!("a whole number of 1 or more: {name} = {example}");
        let Some(expr) = self.expr(name, &expected)? else { return Ok(None) };
        let good = match bare(expr) {
            Expr::Lit(ExprLit { lit: Lit::Int(number), .. }) => {
                number.base10_parse::<u32>().is_ok_and(|number| number > 0)
            }
            Expr::Lit(_) | Expr::Unary(_) => false,
            _ => true,
        };
        if good { Ok(Some(expr)) } else { Err(Error::new_spanned(expr, format!("`{name}` needs {expected}"))) }
    }

    /// A text, or an expression that the compiler checks.
    pub(crate) fn text(&self, name: &str, example: &str) -> Result<Option<&Expr>> {
        let expected = format!("a text: {name} = {example:?}");
        let Some(expr) = self.expr(name, &expected)? else { return Ok(None) };
        check_text(expr, || format!("`{name}` needs {expected}"), &format!("`{name}`"))?;
        Ok(Some(expr))
    }

    /// A text that must be known while compiling.
    pub(crate) fn literal(&self, name: &str, expected: &str) -> Result<Option<LitStr>> {
        let Some(expr) = self.expr(name, expected)? else { return Ok(None) };
        match bare(expr) {
            Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) => Ok(Some(text.clone())),
            _ => Err(Error::new_spanned(expr, format!("`{name}` needs {expected}"))),
        }
    }

    /// Every `name(values)` with so many values.
    pub(crate) fn lists(&self, name: &str, count: usize, example: &str) -> Result<Vec<&[Expr]>> {
        let lists = self.given.iter().filter(|given| given.name == name).map(|given| match &given.value {
            Value::List(values) if values.len() == count => Ok(values.as_slice()),
            _ => Err(Error::new(given.name.span(), format!("`{name}` is written as {example}"))),
        });
        lists.collect()
    }

    /// The path of the crate: `crate = path`.
    pub(crate) fn krate(&self) -> Result<Path> {
        match self.expr("crate", "a path: crate = my_name_for_polymq")? {
            None => syn::parse_str("::polymq"),
            Some(Expr::Path(path)) if path.qself.is_none() => Ok(path.path.clone()),
            Some(other) => Err(Error::new_spanned(other, "`crate` needs a path: crate = my_name_for_polymq")),
        }
    }
}

/// The expression without the invisible groups that `macro_rules!` puts around what it was given.
fn bare(expr: &Expr) -> &Expr {
    match expr {
        Expr::Group(group) => bare(&group.expr),
        Expr::Paren(paren) => bare(&paren.expr),
        other => other,
    }
}

/// Refuses literals that are no text, and texts that no channel or kind may have.
pub(crate) fn check_text(expr: &Expr, expected: impl Fn() -> String, what: &str) -> Result<()> {
    let Expr::Lit(literal) = bare(expr) else { return Ok(()) };
    let Lit::Str(text) = &literal.lit else { return Err(Error::new_spanned(expr, expected())) };
    let value = text.value();
    if value.trim().is_empty() {
        return Err(Error::new_spanned(expr, format!("{what} is empty")));
    }
    if value.chars().any(char::is_control) || value.trim() != value {
        return Err(Error::new_spanned(expr, format!("{what} holds a control character or white space at an end")));
    }
    Ok(())
}

fn unknown(name: &str, known: &[&str]) -> String {
    let list = known.join(", ");
    // The nearest word is worth more than the list alone; a distance above 2 would only guess.
    let near = known
        .iter()
        .map(|other| (strsim::levenshtein(name, other), other))
        .min()
        .filter(|(distance, _)| *distance <= 2);
    match near {
        Some((_, near)) => format!("unknown option `{name}`, did you mean `{near}`? known: {list}"),
        None if known.contains(&"with") => {
            format!(
                "unknown option `{name}`; one that a backend knows is written as with(\"{name}\", \"...\"); known: {list}"
            )
        }
        None => format!("unknown option `{name}`; known: {list}"),
    }
}

/// Every problem of one attribute, told at once.
#[derive(Default)]
pub(crate) struct Problems(Option<Error>);

impl Problems {
    pub(crate) fn add(&mut self, error: Error) {
        match &mut self.0 {
            Some(first) => first.combine(error),
            None => self.0 = Some(error),
        }
    }

    pub(crate) fn at(&mut self, place: impl ToTokens, sentence: impl std::fmt::Display) {
        self.add(Error::new_spanned(place, sentence));
    }

    /// The value, or its error kept for later and `None`.
    pub(crate) fn take<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.add(error)).ok()
    }

    pub(crate) fn into_result(self) -> Result<()> {
        self.0.map_or(Ok(()), Err)
    }
}
