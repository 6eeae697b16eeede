//! Tables for people: columns aligned, numbers to the right.

/// Rows under a header; columns are as wide as they need to be.
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

struct Column {
    title: &'static str,
    right: bool,
}

impl Table {
    /// A table with these columns; a title that starts with `>` aligns its column to the right.
    pub fn new(titles: &[&'static str]) -> Table {
        let column = |title: &&'static str| match title.strip_prefix('>') {
            Some(title) => Column { title, right: true },
            None => Column { title, right: false },
        };
        Table { columns: titles.iter().map(column).collect(), rows: Vec::new() }
    }

    /// Adds a row; it has as many cells as there are columns.
    pub fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.columns.len());
        self.rows.push(cells);
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let titles: Vec<String> = self.columns.iter().map(|column| column.title.into()).collect();
        let width = |index: usize| {
            let cells = std::iter::once(&titles).chain(&self.rows);
            cells.filter_map(|row| row.get(index)).map(|cell| cell.chars().count()).max()
        };
        let widths: Vec<usize> =
            (0..self.columns.len()).map(|index| width(index).unwrap_or(0)).collect();
        for row in std::iter::once(&titles).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, column), width) in row.iter().zip(&self.columns).zip(&widths) {
                if !line.is_empty() {
                    line.push_str("  ");
                }
                let padding = " ".repeat(width - cell.chars().count());
                match column.right {
                    true => line.extend([padding.as_str(), cell]),
                    false => line.extend([cell.as_str(), &padding]),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["NAME", ">SIZE", "STATE"]);
        table.row(vec!["file:a".into(), "64 MiB".into(), "idle".into()]);
        table.row(vec!["mem:long-name".into(), "1 µs".into(), String::new()]);
        let expected = "\
NAME             SIZE  STATE
file:a         64 MiB  idle
mem:long-name    1 µs
";
        assert_eq!(table.to_string(), expected);
    }
}
