import org.flywaydb.core.Flyway;

/** Migrate the database of a JDBC URL by the files of the folder `migrations`. */
public class RunFlyway {
    public static void main(String[] arguments) {
        String url = arguments[0];
        Flyway.configure().dataSource(url, null, null).locations("filesystem:migrations").load().migrate();
    }
}
