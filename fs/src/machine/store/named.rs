//! The tables of what users name, and of templates. The slot of a template counts down from the largest there is, so
//! that it is never a machine's.

use super::super::error::MachineError;
use super::super::vars::{VarKind, VarRow};
use super::tables;
use rusqlite::{Connection, params};

/// A template as it is written down.
#[derive(Clone, Debug)]
pub struct TemplateRow {
    /// Its number.
    pub slot: u32,
    /// Its name.
    pub name: String,
    /// Its owner.
    pub uid: u32,
    /// Its owner's group.
    pub gid: u32,
    /// Its configuration.
    pub config: Vec<(String, String)>,
    /// What it gives to machines.
    pub vars: Vec<VarRow>,
}

/// Inserts or replaces a named thing.
pub fn put_var(db: &Connection, slot: u32, row: &VarRow) -> Result<(), MachineError> {
    db.prepare_cached("INSERT OR REPLACE INTO var (slot, kind, id, name, value) VALUES (?, ?, ?, ?, ?)")?
        .execute(params![slot, row.kind as u8, row.id, row.name, row.value])?;
    Ok(())
}

/// Forgets a named thing.
pub fn delete_var(db: &Connection, slot: u32, kind: VarKind, id: u32) -> Result<(), MachineError> {
    db.prepare_cached("DELETE FROM var WHERE slot = ? AND kind = ? AND id = ?")?
        .execute(params![slot, kind as u8, id])?;
    Ok(())
}

/// What a machine or template has.
pub fn vars(db: &Connection, slot: u32) -> Result<Vec<VarRow>, MachineError> {
    let rows: Vec<(u8, u32, String, Vec<u8>)> = db
        .prepare_cached("SELECT kind, id, name, value FROM var WHERE slot = ? ORDER BY id")?
        .query_map(params![slot], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?
        .collect::<Result<_, _>>()?;
    let row = |(kind, id, name, value)| VarKind::from_number(kind).map(|kind| VarRow { kind, id, name, value });
    Ok(rows.into_iter().filter_map(row).collect())
}

/// Writes a template down.
pub fn put_template(db: &Connection, row: &TemplateRow) -> Result<(), MachineError> {
    db.execute(
        "INSERT OR REPLACE INTO template (slot, name, uid, gid) VALUES (?, ?, ?, ?)",
        params![row.slot, row.name, row.uid, row.gid],
    )?;
    for (key, value) in &row.config {
        tables::set_config(db, row.slot, key, value)?;
    }
    Ok(())
}

/// Forgets a template.
pub fn delete_template(db: &Connection, slot: u32) -> Result<(), MachineError> {
    for table in ["config", "var", "template"] {
        db.execute(&format!("DELETE FROM {table} WHERE slot = ?"), params![slot])?;
    }
    Ok(())
}

/// All templates.
pub fn templates(db: &Connection) -> Result<Vec<TemplateRow>, MachineError> {
    let mut rows: Vec<TemplateRow> = db
        .prepare("SELECT slot, name, uid, gid FROM template")?
        .query_map([], |row| {
            let (config, vars) = (Vec::new(), Vec::new());
            Ok(TemplateRow { slot: row.get(0)?, name: row.get(1)?, uid: row.get(2)?, gid: row.get(3)?, config, vars })
        })?
        .collect::<Result<_, _>>()?;
    for row in &mut rows {
        row.config = tables::config(db, row.slot)?;
        row.vars = vars(db, row.slot)?;
    }
    Ok(rows)
}

/// Forgets what was set for a machine or template while that was being forgotten itself. Slot 0 is the service.
pub fn drop_orphans(db: &Connection) -> Result<(), MachineError> {
    for table in ["config", "var"] {
        db.execute(
            &format!(
                "DELETE FROM {table} WHERE slot <> 0 AND slot NOT IN (SELECT slot FROM machine UNION SELECT slot FROM template)"
            ),
            [],
        )?;
    }
    Ok(())
}
